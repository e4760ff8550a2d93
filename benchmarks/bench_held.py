"""Experts as they are published, held in their bits and decoded in the pass: memory, error and time, beside the same in bfloat16.

`python benchmarks/bench_held.py [--size 1024x4096] [--threads 1] [--json]`. error: of the answers, relative (Frobenius norm) to those of
the weights before they were rounded; added: relative to the numbers that the files hold, computed in float64, so what computing with
rows in bfloat16 adds. us: of one expert of 8, for n rows each, by the fastest call; with one thread, of its CPU time.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version

import torch
from bench_precision import cpu_model
from published_experts import NAMES, published
from rich.console import Console
from rich.table import Table
from torch import Tensor

from moeserve.allocator import keep_large_blocks
from moeserve.experts import Expert, ExpertBank, FeedForward, QuantizedFeedForward

EXPERTS = 8
ROWS = (1, 4, 16, 64, 256)


@dataclass(frozen=True)
class Row:
    """bits: of memory for a weight."""

    weights: str
    bits: float
    error: float
    added: float
    us: tuple[float, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1024x4096", help="hidden x intermediate size")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9, help="calls of every kind and number of rows")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    keep_large_blocks()  # as the server does
    torch.set_num_threads(options.threads)
    hidden, intermediate = map(int, options.size.split("x"))
    rows = list(measured(hidden, intermediate, options.rounds))
    versions = f"moeserve {version('moeserve')}, torch {torch.__version__}"
    about = f"{date.today()}, {cpu_model()}, {options.threads} threads, {hidden} x {intermediate}, {versions}"
    if options.json:
        print(json.dumps({"about": about, "rows": [asdict(row) for row in rows]}, indent=2))
    else:
        Console(width=140).print(about, table(rows))


def measured(hidden: int, intermediate: int, rounds: int) -> Iterator[Row]:
    exact = [drawn(hidden, intermediate, seed) for seed in range(EXPERTS)]
    in_full = [FeedForward("swiglu", each.gate_up_proj.bfloat16(), each.down_proj.bfloat16()) for each in exact]
    kinds: dict[str, list[Expert]] = {"bfloat16": [*in_full]}
    banks = {"bfloat16": ExpertBank(in_full, hidden, torch.bfloat16)}
    for name in NAMES:
        kinds[name] = [published(each, name) for each in exact]
        banks[name] = ExpertBank(kinds[name], hidden, torch.bfloat16)
    times = {count: fastest(banks, hidden, count, rounds) for count in ROWS}
    rows = torch.randn(256, hidden, generator=torch.Generator().manual_seed(99)).bfloat16()
    for name, bank in banks.items():
        answer, before, files = bank.experts[0](rows).double(), in_float64(exact[0], rows), in_float64(kinds[name][0], rows)
        bits = 8 * bank.nbytes / (EXPERTS * 3 * hidden * intermediate)
        yield Row(name, bits, relative(answer, before), relative(answer, files), tuple(times[count][name] for count in ROWS))


def drawn(hidden: int, intermediate: int, seed: int) -> FeedForward:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2 * intermediate, hidden), (hidden, intermediate))
    gate_up, down = (torch.randn(shape, generator=generator) * shape[1] ** -0.5 for shape in shapes)
    return FeedForward("swiglu", gate_up, down)


def in_float64(expert: Expert, rows: Tensor) -> Tensor:
    if isinstance(expert, QuantizedFeedForward):
        gate_up, down = torch.cat([matrix.dequantized() for matrix in expert.gate_up_proj]), expert.down_proj.dequantized()
    else:
        assert isinstance(expert, FeedForward)
        gate_up, down = expert.gate_up_proj, expert.down_proj
    gate, up = (rows.double() @ gate_up.double().t()).chunk(2, dim=1)
    return (torch.nn.functional.silu(gate) * up) @ down.double().t()


def relative(ours: Tensor, exact: Tensor) -> float:
    return float((ours - exact).norm() / exact.norm())


def fastest(banks: dict[str, ExpertBank], hidden: int, count: int, rounds: int) -> dict[str, float]:
    """Microseconds for an expert, turn by turn."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    rows, local_experts = torch.randn(count, hidden).bfloat16(), torch.arange(EXPERTS).repeat_interleave(count)
    index, weights, out = torch.arange(count).repeat(EXPERTS), torch.ones(EXPERTS * count), torch.empty(count, hidden)
    best = dict.fromkeys(banks, float("inf"))
    for _ in range(rounds):
        for name, bank in banks.items():
            started = clock()
            bank.run(rows, index, local_experts, weights, out)
            best[name] = min(best[name], (clock() - started) / EXPERTS * 1e6)
    return best


def table(rows: list[Row]) -> Table:
    made = Table("weights")
    for column in ("bits", "error", "added", *(f"us, n = {count}" for count in ROWS)):
        made.add_column(column, justify="right")
    for row in rows:
        made.add_row(row.weights, f"{row.bits:.2f}", f"{row.error:.2%}", f"{row.added:.2%}", *(f"{each:,.0f}" for each in row.us))
    return made


if __name__ == "__main__":
    main()
