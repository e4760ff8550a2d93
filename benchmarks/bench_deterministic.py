"""What `model.deterministic` costs: a whole MoELayer of random weights, with and without it, turn by turn.

`python benchmarks/bench_deterministic.py [--threads 2]`. H = 2048, I = 768, E = 32, K = 8. T tokens.
"""

from __future__ import annotations

import argparse
from datetime import date
from functools import partial
from importlib.metadata import version

import torch
from bench_precision import cpu_model
from rich.console import Console
from rich.table import Table

from moeserve import GatingConfig, MoELayer
from moeserve.allocator import keep_large_blocks
from moeserve.config import Kernel
from moeserve.kernels import fastest_of

TOKENS = (1, 16, 64, 256, 1024)
KERNELS: tuple[Kernel, ...] = ("auto", "torch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    keep_large_blocks()  # as the server does
    torch.set_num_threads(options.threads)
    table = Table("weights", "kernel", "gate")
    for column in ("T", "usual ms", "deterministic ms", "times"):
        table.add_column(column, justify="right")
    for dtype in (torch.bfloat16, torch.float32):
        for kernel in KERNELS:
            for scoring in ("softmax", "sigmoid") if kernel == "auto" else ("softmax",):
                for row in measured(dtype, kernel, scoring, options.rounds):
                    table.add_row(str(dtype).removeprefix("torch."), kernel, scoring, *row)
    about = f"{date.today()}, {cpu_model()}, {options.threads} threads, moeserve {version('moeserve')}, torch {version('torch')}"
    Console().print(about, table)


def measured(dtype: torch.dtype, kernel: Kernel, scoring: str, rounds: int) -> list[tuple[str, ...]]:
    gating = GatingConfig.model_validate({"top_k": 8, "scoring_func": scoring, "renormalize": "pre_drop"})
    sizes = {"hidden_size": 2048, "intermediate_size": 768, "num_experts": 32, "dtype": dtype, "gating": gating, "kernel": kernel}
    usual, invariant = (MoELayer(**sizes, deterministic=is_on) for is_on in (False, True))  # type: ignore[arg-type]
    rows: list[tuple[str, ...]] = []
    for tokens in TOKENS:
        hidden_states = torch.randn(tokens, 2048, generator=torch.Generator().manual_seed(tokens)).to(dtype)
        sides = {"usual": partial(usual, hidden_states), "invariant": partial(invariant, hidden_states)}
        taken = fastest_of(sides, rounds)
        times = f"{taken['usual'] * 1e3:.2f}", f"{taken['invariant'] * 1e3:.2f}", f"{taken['invariant'] / taken['usual']:.2f}"
        rows.append((str(tokens), *times))
    return rows


if __name__ == "__main__":
    main()
