"""Experts on one GPU, in at most five minutes and without Ray: are they right, and how far from what the hardware's own kernel does.

`python benchmarks/gpu.py [--json]` on a machine with a GPU; `--device cpu --quick` tries the script itself anywhere.
Right: a bank's answers against the same experts in float64 on the CPU. Grouped: a whole bank (gather, two projections, activation, weights,
sums) against the two bare `grouped_mm` in it. Decoding: 8-bit experts against the same ones in bfloat16.
T tokens, H hidden size, I intermediate size, E experts, K choices per token, N = T K pairs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from importlib.metadata import version
from typing import get_args

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from moeserve.config import Quantization
from moeserve.experts import ExpertBank, FeedForward, quantize

#: H, I, E, K
SHAPES = {"qwen3": (2048, 768, 128, 8), "deepseek": (7168, 2048, 64, 8)}
QUICK = {"quick": (64, 32, 8, 2)}
TOKENS = (1, 4, 16, 64, 256, 1024, 4096)


@dataclass(frozen=True)
class Row:
    """Milliseconds of one pass over a bank; bare: of what it is compared with; error: of its answers, relative, Frobenius."""

    what: str
    shape: str
    tokens: int
    bank_ms: float
    bare_ms: float
    error: float


def main() -> None:
    options = parse()
    device = torch.device(options.device)
    rows: list[Row] = []
    for name, (hidden, inner, count, top_k) in (QUICK if options.quick else SHAPES).items():
        experts = [some_expert(hidden, inner, device) for _ in range(count)]
        bank = ExpertBank(experts, hidden, torch.bfloat16, device=device)
        gate_up = torch.stack([expert.gate_up_proj for expert in experts])
        down = torch.stack([expert.down_proj for expert in experts])
        for tokens in TOKENS[:3] if options.quick else TOKENS:
            work = some_work(tokens, hidden, count, top_k, device)
            bare = partial(grouped, work, gate_up, down) if device.type == "cuda" else None
            rows.append(measured("grouped", name, bank, work, bare, experts))
        del bank, gate_up, down, bare
        rows += decoded(name, experts, top_k, device)
    where = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    about = f"{date.today()}, {where}, moeserve {version('moeserve')}, torch {version('torch')}"
    if options.json:
        print(json.dumps({"about": about, "rows": [asdict(row) for row in rows]}, indent=2))
    else:
        Console().print(about, table(rows))


Work = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def some_expert(hidden: int, inner: int, device: torch.device) -> FeedForward:
    gate_up, down = (torch.randn(shape, device=device).mul_(shape[1] ** -0.5) for shape in ((2 * inner, hidden), (hidden, inner)))
    return FeedForward("swiglu", gate_up.bfloat16(), down.bfloat16())


def some_work(tokens: int, hidden: int, count: int, top_k: int, device: torch.device) -> Work:
    """hidden_states [T, H], row_index [N], local_experts [N] ascending, weights [N]: every token chooses K different experts."""
    choices = torch.rand(tokens, count, generator=torch.Generator().manual_seed(tokens)).topk(top_k, dim=1).indices
    local_experts, order = choices.flatten().sort(stable=True)
    weights = torch.full((tokens * top_k,), 1 / top_k)
    hidden_states = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(tokens)).bfloat16()
    return hidden_states.to(device), (order // top_k).to(device), local_experts, weights.to(device)


def measured(what: str, shape: str, bank: ExpertBank, work: Work, bare: Callable[[], object] | None, experts: list[FeedForward]) -> Row:
    out = torch.empty(work[0].shape, device=bank.device)
    taken = milliseconds(lambda: bank.run(*work, out=out), bank.device)
    expected, rows = exact(work, experts)
    error = float((out[rows].double().cpu() - expected).norm() / expected.norm())
    return Row(what, shape, len(work[0]), taken, float("nan") if bare is None else milliseconds(bare, bank.device), error)


def grouped(work: Work, gate_up: torch.Tensor, down: torch.Tensor) -> None:
    """The two matmuls alone, over rows that have been gathered."""
    hidden_states, row_index, local_experts, _ = work
    ends = torch.bincount(local_experts, minlength=len(gate_up)).cumsum(0).to(gate_up.device, torch.int32)
    gate, up = F.grouped_mm(hidden_states[row_index], gate_up.transpose(1, 2), offs=ends).chunk(2, dim=1)
    F.grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=ends)


def decoded(shape: str, experts: list[FeedForward], top_k: int, device: torch.device) -> list[Row]:
    few = experts[: max(top_k, 8)]
    hidden = few[0].down_proj.shape[0]
    plain = ExpertBank(few, hidden, torch.bfloat16, device=device)
    rows = []
    for quantization in get_args(Quantization)[:2]:
        bank = ExpertBank([quantize(expert, quantization) for expert in few], hidden, torch.bfloat16, device=device)
        for tokens in (1, 64, 1024) if device.type == "cuda" else (1,):
            work = some_work(tokens, hidden, len(few), min(top_k, len(few)), device)
            out = torch.empty(work[0].shape, device=device)
            rows.append(measured(quantization, shape, bank, work, partial(plain.run, *work, out), few))
    return rows


def exact(work: Work, experts: list[FeedForward]) -> tuple[torch.Tensor, list[int]]:
    """The first and the last row's answers in float64, on the CPU."""
    hidden_states, row_index, local_experts, weights = (tensor.cpu() for tensor in work)
    rows = sorted({0, len(hidden_states) - 1})
    expected = torch.zeros(len(rows), hidden_states.shape[1], dtype=torch.float64)
    for position, row in enumerate(rows):
        for pair in (row_index == row).nonzero().flatten().tolist():
            expert = experts[int(local_experts[pair])]
            gate, up = (expert.gate_up_proj.cpu().double() @ hidden_states[row].double()).chunk(2)
            expected[position] += weights[pair].double() * (expert.down_proj.cpu().double() @ (F.silu(gate) * up))
    return expected, rows


def milliseconds(run: Callable[[], object], device: torch.device, rounds: int = 20) -> float:
    """The median of `rounds` runs, each waited for."""
    run()
    taken = []
    for _ in range(rounds):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        taken.append(time.perf_counter() - start)
    return sorted(taken)[rounds // 2] * 1e3


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def table(rows: list[Row]) -> Table:
    made = Table("what", "shape")
    for column in ("T", "bank ms", "compared ms", "ratio", "error"):
        made.add_column(column, justify="right")
    for row in rows:
        times = (f"{row.bank_ms:.3f}", f"{row.bare_ms:.3f}", f"{row.bare_ms / row.bank_ms:.2f}")
        made.add_row(row.what, row.shape, str(row.tokens), *times, f"{row.error:.1e}")
    return made


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: only whether it runs, and computes the right answers")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser.parse_args()


if __name__ == "__main__":
    main()
