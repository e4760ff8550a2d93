"""What it costs to serve a model that is larger than the memory of its host.

`python benchmarks/bench_spill.py [--memory 1,0.5] [--skew 0,1.2] [--tokens 1,64] [--cold] [--json]`. A random checkpoint of --layers times
--experts experts in bfloat16 is written once. One host, a thread of this process, serves it with memory for a share of the experts. One
caller has routed already, by Zipf's law with this exponent (0 = evenly), and asks layer after layer, as a model does. Each row says what a
request of a layer takes, which share of the experts that passes use is in memory, and what an expert costs that is not. All answers are
compared, bit by bit, with those of the service that has all experts in memory. Files are in the page cache; with --cold, they are dropped
from it before each request, as far as this process may.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from bench_precision import cpu_model
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

import moeserve

TOP_K, FILE = 4, "model.safetensors"


@dataclass(frozen=True)
class Row:
    """memory: as a share of the experts' bytes; hits: share of the experts that were in memory; ms of one request of a layer.

    read_ms: what each expert that was not in memory has added; wrong: answers that differ from those without a limit.
    """

    memory: float
    skew: float
    tokens: int
    requests: int
    p50_ms: float
    p99_ms: float
    tokens_per_s: float
    hits: float
    read_ms: float
    wrong: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--size", default="1024x1024", help="hidden x intermediate size")
    parser.add_argument("--memory", default="1,0.75,0.5,0.25", help="shares of the experts' bytes; the first must be 1")
    parser.add_argument("--skew", default="0,1.2")
    parser.add_argument("--tokens", default="1,64")
    parser.add_argument("--requests", type=int, default=400, help="of all layers together, for every row")
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    about = (
        f"{date.today()}, {cpu_model()}, {os.cpu_count()} cores, {options.layers} x {options.experts} experts of {options.size}, bfloat16"
    )
    about += f", top {TOP_K}, {'cold' if options.cold else 'page cache'}; moeserve {version('moeserve')}, torch {torch.__version__}"
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), options.layers, options.experts, *map(int, options.size.split("x")))
        rows = list(measured(Path(folder), options))
    if options.json:
        print(json.dumps({"about": about, "rows": [asdict(row) for row in rows]}, indent=2))
    else:
        Console(width=140).print(about, table(rows))


def write(folder: Path, layers: int, experts: int, hidden: int, inner: int) -> None:
    config = {"model_type": "mixtral", "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": inner, "hidden_act": "silu"}
    (folder / "config.json").write_text(json.dumps({**config, "num_local_experts": experts, "num_experts_per_tok": TOP_K}))
    shapes = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    tensors, generator = {}, torch.Generator().manual_seed(0)
    for layer in (f"model.layers.{number}.mlp" for number in range(layers)):
        tensors[f"{layer}.gate.weight"] = torch.randn(experts, hidden, generator=generator).bfloat16()
        for expert in range(experts):
            for name, shape in shapes.items():
                weight = torch.randn(shape, generator=generator) * shape[1] ** -0.5
                tensors[f"{layer}.experts.{expert}.{name}.weight"] = weight.bfloat16()
    save_file(tensors, folder / FILE)


def measured(folder: Path, options: argparse.Namespace) -> Iterator[Row]:
    hidden, inner = map(int, options.size.split("x"))
    all_bytes = options.layers * options.experts * 3 * hidden * inner * 2
    exact: dict[tuple[float, int], list[torch.Tensor]] = {}
    fast: dict[tuple[float, int], float] = {}
    for memory in map(float, options.memory.split(",")):
        config = {
            "model": {"checkpoint": folder},
            "placement": {"num_hosts": 1, "memory_per_host_bytes": int(memory * all_bytes)},
            "store": {"spill": "disk"},
            "server": {"port": 0, "metrics_port": 0},
        }
        with moeserve.serve(config, cluster="threads") as service, moeserve.Client(service.target) as client:
            for case in ((skew, tokens) for skew in map(float, options.skew.split(",")) for tokens in map(int, options.tokens.split(","))):
                asked = list(requests(*case, options, hidden))
                before = loads(service)
                seconds, answers = timed(client, asked, options.layers, folder / FILE if options.cold else None)
                used, read = (after - earlier for after, earlier in zip(loads(service), before, strict=True))
                reference = exact.setdefault(case, answers)
                mean = sum(seconds) / len(seconds)
                extra = (mean - fast.setdefault(case, mean)) * len(seconds)
                ordered = sorted(seconds)
                yield Row(
                    memory,
                    *case,
                    len(seconds),
                    ordered[len(ordered) // 2] * 1e3,
                    ordered[int(0.99 * len(ordered))] * 1e3,
                    case[1] / mean,
                    1 - read / used,
                    extra / read * 1e3 if read else 0.0,
                    sum(not torch.equal(ours, other) for ours, other in zip(answers, reference, strict=True)),
                )


def requests(skew: float, tokens: int, options: argparse.Namespace, hidden: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Rows and what they are routed to; which experts are busy differs from layer to layer."""
    generator = torch.Generator().manual_seed(1)
    shares = torch.arange(1, options.experts + 1) ** -skew
    orders = [torch.randperm(options.experts, generator=generator) for _ in range(options.layers)]
    for number in range(options.requests):
        drawn = torch.multinomial(shares.expand(tokens, -1), TOP_K, generator=generator)
        yield torch.randn(tokens, hidden, generator=generator).bfloat16(), orders[number % options.layers][drawn]


def timed(
    client: moeserve.Client, asked: Sequence[tuple[torch.Tensor, torch.Tensor]], layers: int, dropped: Path | None
) -> tuple[list[float], list[torch.Tensor]]:
    """Seconds and answers of all requests, after a warm-up with the first half of them."""
    seconds, answers = [], []
    for number, (rows, ids) in [*enumerate(asked[: len(asked) // 2]), *enumerate(asked)]:
        if dropped is not None:
            drop(dropped)
        began = time.perf_counter()
        answer = client.forward(rows, layer=number % layers, topk_ids=ids, topk_weights=torch.full(ids.shape, 1 / TOP_K))
        seconds.append(time.perf_counter() - began)
        answers.append(answer.hidden_states.clone())
    return seconds[-len(asked) :], answers[-len(asked) :]


def drop(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def loads(service: Any) -> tuple[int, int]:
    """Experts that passes have used, and that were read first."""
    (member,) = service._service.program.cluster.hosts.members.values()
    loads: tuple[int, int] = member.host.holdings.store.cache.loads
    return loads


def table(rows: Sequence[Row]) -> Table:
    made = Table("memory")
    for column in ("skew", "tokens", "p50 ms", "p99 ms", "tokens/s", "in memory", "ms per read", "wrong"):
        made.add_column(column, justify="right")
    for row in rows:
        times = (f"{row.p50_ms:.2f}", f"{row.p99_ms:.2f}", f"{row.tokens_per_s:,.0f}", f"{row.hits:.0%}", f"{row.read_ms:.2f}")
        made.add_row(f"{row.memory:.0%}", f"{row.skew:g}", str(row.tokens), *times, f"{row.wrong} of {row.requests}")
    return made


if __name__ == "__main__":
    main()
