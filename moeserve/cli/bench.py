"""`moeserve bench`: load a layer of a running service, and measure it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, TextIO

import typer

from moeserve.cli.arguments import check, check_seed, numbers_of
from moeserve.cli.signals import preparing, until_signal
from moeserve.cli.target import Target, TlsCa, TokenFile, layer_of, timeout_of, tls_of, token_of
from moeserve.errors import ConfigError

if TYPE_CHECKING:
    from moeserve.bench.costs import Costs
    from moeserve.bench.load import Load, Measured
    from moeserve.client import AsyncClient

_DURATION_S: Final = 5.0


def bench(
    target: Target,
    layer: Annotated[str, typer.Option(help="Position of the layer (0 = the first MoE layer) or its name.")] = "0",
    tokens: Annotated[str, typer.Option(help="Tokens of a request; several, as in 1,64,1024 = one run for each.")] = "64",
    concurrency: Annotated[
        str | None, typer.Option(help="Requests in progress at any time; several = one run for each.", show_default="8")
    ] = None,
    rate: Annotated[str | None, typer.Option(help="Instead: requests to start per second, finished or not; several = sweep.")] = None,
    duration_s: Annotated[float | None, typer.Option(help="Length of a run in seconds.", show_default="5")] = None,
    requests: Annotated[int | None, typer.Option(help="Instead: requests of a run.")] = None,
    dtype: Annotated[str, typer.Option(help="Element type that is sent: float32, float16, bfloat16.")] = "float32",
    stream: Annotated[bool, typer.Option("--stream", help="Over one ForwardStream instead of a Forward for each request.")] = False,
    token_ids: Annotated[bool, typer.Option("--token-ids", help="Send token ids too; layers with routing = hash need them.")] = False,
    warmup_requests: Annotated[int, typer.Option(help="Requests before each run, not measured.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the random inputs.")] = 0,
    record: Annotated[Path | None, typer.Option(help="Also write what every expert is asked, each second, for simulate --load.")] = None,
    costs: Annotated[Path | None, typer.Option(help="Instead: measure what a call costs, for simulate --costs.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
    token_file: TokenFile = None,
    tls_ca: TlsCa = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for an answer.")] = 30.0,
) -> int:
    """Load one layer and show tokens/s, requests/s, latencies, drops and errors. Exit code 1: every request failed.

    With --rate, latency counts from the time when a request should have started, so a service that falls behind cannot hide it.
    """
    with preparing():
        from moeserve.api.tensors import FLOAT_DTYPES
        from moeserve.bench.measuring import measured_costs
        from moeserve.bench.report import print_json, print_table
        from moeserve.bench.runs import Inputs, run_all
        from moeserve.bench.stream_sender import StreamSender
        from moeserve.client import AsyncClient

    loads = _loads(tokens, concurrency, rate, duration_s, requests)
    check(dtype in FLOAT_DTYPES, f"--dtype is {dtype}; allowed: {', '.join(FLOAT_DTYPES)}")
    check_seed(seed)
    check(warmup_requests >= 0, f"--warmup-requests is {warmup_requests}; allowed: 0 and more")
    timeout_s = timeout_of(timeout)
    connect = partial(AsyncClient, target, token=token_of(token_file), tls=tls_of(tls_ca), timeout=timeout_s, retry=False)
    client, inputs = connect(), Inputs(FLOAT_DTYPES[dtype], token_ids, seed)
    measured: list[Measured] = []
    if costs is not None:
        check(record is None and not stream, "--costs excludes --record and --stream: it sends requests of its own, one after the other")
        return _measure_costs(costs, lambda: measured_costs(client, layer_of(layer), inputs))
    try:
        sender = StreamSender(client, timeout_s) if stream else None
        running = partial(run_all, client, layer_of(layer), loads, inputs, sender, warmup_requests, measured)
        asyncio.run(until_signal(running() if record is None else _recorded(record, connect(), running)))
    finally:
        # After Ctrl-C too: complete runs are not lost.
        if measured:
            runs = [one.as_json() for one in measured]
            if as_json:
                print_json({"target": target, "layer": layer, "dtype": dtype, "stream": stream, "runs": runs})
            else:
                print_table(runs)
    return 1 if all(not one.latencies_s for one in measured) else 0


def _measure_costs(path: Path, measure: Callable[[], Coroutine[Any, Any, Costs]]) -> int:
    with _written(path, "a"):  # said before it is measured, not afterwards; what is there stays until then
        pass
    costs = asyncio.run(until_signal(measure()))
    with _written(path) as file:
        file.write(costs.to_json())
    return 0


async def _recorded(path: Path, client: AsyncClient, measure: Callable[[], Awaitable[None]]) -> None:
    from moeserve.bench.recording import record

    with _written(path) as file:
        async with client:
            await record(client, file, measure)


@contextmanager
def _written(path: Path, mode: Literal["w", "a"] = "w") -> Iterator[TextIO]:
    """Raises ConfigError when it cannot be, also when the disk is full in the end."""
    try:
        with path.open(mode, encoding="utf-8") as file:
            yield file
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from None


def _loads(tokens: str, concurrency: str | None, rate: str | None, duration_s: float | None, requests: int | None) -> list[Load]:
    from moeserve.bench.load import Load

    check(concurrency is None or rate is None, "--concurrency and --rate exclude each other: --rate starts requests by the clock")
    check(duration_s is None or requests is None, "--duration-s and --requests exclude each other")
    check(duration_s is None or 0 < duration_s <= 86_400, f"--duration-s is {duration_s}; allowed: more than 0, at most 86400")
    check(requests is None or requests > 0, f"--requests is {requests}; allowed: 1 and more")
    if requests is None and duration_s is None:
        duration_s = _DURATION_S
    sizes = numbers_of("--tokens", tokens, int)
    if rate is not None:
        return [Load(size, None, each, duration_s, requests) for size in sizes for each in numbers_of("--rate", rate, float)]
    return [Load(size, each, None, duration_s, requests) for size in sizes for each in numbers_of("--concurrency", concurrency or "8", int)]
