"""What each type of weights costs in precision, takes in memory and does in a second, of a whole layer in one process.

`python benchmarks/bench_precision.py [--json]`. Errors are relative: Frobenius norm of the difference from the answers of the same layer
in float32, over that of these answers. The types take turns; tokens are counted per second of CPU time of one thread.
T tokens, H hidden size, I intermediate size, E experts, K choices per token.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from moeserve import MoELayer
from moeserve.allocator import keep_large_blocks
from moeserve.config import Quantization

TYPES: tuple[tuple[torch.dtype, Quantization | None], ...] = (
    (torch.float32, None),
    (torch.bfloat16, None),
    (torch.float16, None),
    (torch.bfloat16, "int8"),
    (torch.float32, "int8"),
    (torch.bfloat16, "fp8"),
    (torch.float32, "fp8"),
)
TINY_MOE = Path(__file__).parents[1] / "examples" / "tiny-moe"
Make = Callable[[torch.dtype, Quantization | None], MoELayer]


@dataclass(frozen=True)
class Row:
    """One type of weights of one layer. error: relative, of T = 1024 answers; expert_bytes: of one expert; tokens per CPU second."""

    layer: str
    weights: str
    rows: str
    error: float
    expert_bytes: int
    tokens_per_s_at_1: float
    tokens_per_s_at_1024: float


def main() -> None:
    options = parse()
    keep_large_blocks()  # as the server does
    torch.set_num_threads(1)
    rows = [row for name, make in layers().items() for row in measured(name, make, options.rounds)]
    about = f"{date.today()}, {cpu_model()}, one thread, moeserve {version('moeserve')}, torch {version('torch')}"
    if options.json:
        print(json.dumps({"about": about, "rows": [asdict(row) for row in rows]}, indent=2))
    else:
        Console().print(about, table(rows))


def layers() -> dict[str, Make]:
    """H x I x E, K = 2: one of random weights, and the first of the trained checkpoint."""
    return {
        "seeded, 1024 x 4096 x 8": lambda dtype, quantization: MoELayer(
            hidden_size=1024, intermediate_size=4096, num_experts=8, dtype=dtype, quantization=quantization
        ),
        "tiny-moe, 128 x 256 x 8": lambda dtype, quantization: MoELayer.from_checkpoint(TINY_MOE, 0, dtype, quantization=quantization),
    }


def measured(name: str, make: Make, rounds: int) -> Iterator[Row]:
    made = [make(dtype, quantization) for dtype, quantization in TYPES]
    hidden_states = torch.randn(1024, made[0].spec.hidden_size, generator=torch.Generator().manual_seed(0))
    # The question in float32, whatever the experts compute in, so that the gate chooses the same experts.
    exact, *others = [layer(hidden_states) for layer in made]
    errors = [float((answer - exact).norm() / exact.norm()) for answer in (exact, *others)]
    at_1, at_1024 = (speeds(made, hidden_states[:tokens], count) for tokens, count in ((1, 20 * rounds), (1024, rounds)))
    for layer, (dtype, quantization), error, one, many in zip(made, TYPES, errors, at_1, at_1024, strict=True):
        rows = str(dtype).removeprefix("torch.")
        yield Row(name, quantization or rows, rows, error, layer.bank.nbytes // layer.spec.num_experts, one, many)


def speeds(made: list[MoELayer], hidden_states: torch.Tensor, rounds: int) -> list[float]:
    """Tokens per second of this thread's CPU time, by the fastest call: what else uses caches and memory can only slow one down."""
    questions = [hidden_states.to(dtype) for dtype, _ in TYPES]
    fastest = [float("inf")] * len(made)
    for _ in range(rounds):
        for side, (layer, question) in enumerate(zip(made, questions, strict=True)):
            started = time.thread_time()
            layer(question)
            fastest[side] = min(fastest[side], time.thread_time() - started)
    return [len(hidden_states) / seconds for seconds in fastest]


def table(rows: list[Row]) -> Table:
    made = Table("layer", "weights", "rows")
    for column in ("error", "MiB per expert", "tokens/s, T = 1", "T = 1024"):
        made.add_column(column, justify="right")
    for row in rows:
        speeds = (f"{row.tokens_per_s_at_1:,.0f}", f"{row.tokens_per_s_at_1024:,.0f}")
        made.add_row(row.layer, row.weights, row.rows, f"{row.error:.3%}", f"{row.expert_bytes / 2**20:.3f}", *speeds)
    return made


def cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--rounds", type=int, default=8, help="calls of every type with 1024 tokens; 20 times as many with one")
    return parser.parse_args()


if __name__ == "__main__":
    main()
