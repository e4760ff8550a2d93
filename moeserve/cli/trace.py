"""`moeserve trace`: show where the time of a call goes, stage by stage, beside what each stage would take at least."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeserve.cli.arguments import check, check_seed, numbers_of
from moeserve.cli.signals import preparing
from moeserve.cli.target import Target, TlsCa, TokenFile, layer_of, timeout_of, tls_of, token_of

if TYPE_CHECKING:
    from moeserve.client import Client

_MOST_CALLS = 100_000


def trace(
    target: Target,
    layer: Annotated[str, typer.Option(help="Position of the layer (0 = the first MoE layer) or its name.")] = "0",
    tokens: Annotated[str, typer.Option(help="Tokens of a call; several = one run for each.")] = "1,64,1024",
    calls: Annotated[int, typer.Option(help="Calls of a run, one after the other; 5 more come first and do not count.")] = 100,
    dtype: Annotated[str, typer.Option(help="Element type that is sent: float32, float16, bfloat16.")] = "float32",
    token_ids: Annotated[bool, typer.Option("--token-ids", help="Send token ids too; layers with routing = hash need them.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the random inputs.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of tables.")] = False,
    token_file: TokenFile = None,
    tls_ca: TlsCa = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for an answer.")] = 30.0,
) -> int:
    """Show the median, p99 and mean of every stage of a call, and its floor. The stages of a call add up to the whole, and so do the means.

    Floors are measured here, without TLS: medians of what wakes up another process, the best of 20 of all else. gRPC: a bare echo of the
    same bytes in another process. Encode, write and combine: a copy of the same bytes. Decode: to read them once. Queue: a task on an idle
    event loop. Route: the gate's product and top-k. Plan: a stable sort of the choices. Doorbell, wake-up and reply: a bare unix socket to
    a process that sleeps. Kernel: to read the weights of the busiest host's experts, or one dense product of as many operations, whichever
    is longer.

    A service or host on another machine has another clock: the ways there and back are then shown together, as what is left.
    """
    with preparing():
        from moeserve.api.tensors import FLOAT_DTYPES
        from moeserve.bench.report import print_json
        from moeserve.bench.runs import Inputs, served_layer
        from moeserve.bench.stages_report import print_runs
        from moeserve.client import Client
        from moeserve.client.connection import CALLING, Reach

    sizes = numbers_of("--tokens", tokens, int)
    check_seed(seed)
    check(dtype in FLOAT_DTYPES, f"--dtype is {dtype}; allowed: {', '.join(FLOAT_DTYPES)}")
    check(0 < calls <= _MOST_CALLS, f"--calls is {calls}; allowed: 1 to {_MOST_CALLS}")
    token, tls, timeout_s = token_of(token_file), tls_of(tls_ca), timeout_of(timeout)
    reach = Reach(target, token, tls, timeout_s, CALLING)
    with Client(target, token=token, tls=tls, timeout=timeout_s) as client:
        asked = served_layer(client.layers(), layer_of(layer))
        inputs = Inputs(FLOAT_DTYPES[dtype], token_ids, seed)
        runs = _runs(client, reach, asked, {size: inputs.make(asked, size) for size in sizes}, calls)
    if as_json:
        print_json({"target": target, "layer": asked.name, "dtype": dtype, "runs": runs})
    else:
        print_runs(runs)
    return 0


def _runs(client: Client, reach: Any, layer: Any, requests: dict[int, list[Any]], calls: int) -> list[dict[str, Any]]:
    from moeserve.bench.floors import Floors, busiest_part
    from moeserve.bench.stages import timed_calls
    from moeserve.bench.stages_report import run_of

    found = {tokens: timed_calls(reach, each, calls) for tokens, each in requests.items()}
    stats = client.stats()
    placed = next(one.placement for one in stats.layers if one.name == layer.name)
    host_of = {expert: held.host for held in reversed(placed) for expert in held.experts}
    threads = max((host.num_threads for host in stats.hosts), default=1)
    runs = []
    with Floors() as floors:
        for tokens, timed in found.items():
            sent = timed[len(timed) // 2].sent
            least = floors.of(layer, tokens, sent, busiest_part(sent.experts, host_of), threads)
            runs.append(run_of(tokens, timed, least))
    return runs
