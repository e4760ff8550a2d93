"""The grid: every case is a few numbers, from which its router logits follow. T tokens, E experts, K choices per token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

GOLDEN = Path(__file__).with_name("deepspeed.npz")
SHAPES = ((1, 4), (4, 4), (7, 5), (16, 8), (25, 4), (33, 16), (64, 6))
FACTORS = (0.5, 1.0, 1.2, 2.0)
LEAST = (0, 4)
#: how logits are spread: nearly equal, usual, or most tokens want the same experts
SPREADS = ("flat", "usual", "skewed")

Gate = Literal["top1", "top2", "topk"]
DropPolicy = Literal["position", "probs"]


@dataclass(frozen=True)
class Case:
    gate: Gate
    top_k: int
    num_tokens: int
    num_experts: int
    spread: str
    capacity_factor: float
    min_capacity: int
    drop_tokens: bool
    drop_policy: DropPolicy
    has_unused: bool
    number: int


def all_cases() -> Iterator[Case]:
    """In the order of the golden file."""
    number = 0
    gates: list[tuple[Gate, int, DropPolicy, bool]] = [
        ("top1", 1, "position", False),
        ("top1", 1, "position", True),
        ("top2", 2, "position", False),
        *(("topk", k, policy, False) for k in (1, 2, 3, 4) for policy in ("probs", "position")),
    ]
    for (gate, top_k, policy, unused), (tokens, experts), spread in product(gates, SHAPES, SPREADS):
        for factor, least, drop in product(FACTORS, LEAST, (True, False)):
            if not drop and (factor != 1.0 or least):
                continue  # without drops neither matters
            if gate == "top1" and tokens < least:
                continue  # refused there
            yield Case(gate, top_k, tokens, experts, spread, factor, least, drop, policy, unused, number)
            number += 1


def logits_of(case: Case) -> Tensor:
    """[T, E] float32, from NumPy's generator, which promises the same numbers in every version."""
    generator = np.random.Generator(np.random.PCG64(case.number))
    noise = generator.random((case.num_tokens, case.num_experts)) - 0.5
    if case.spread == "flat":
        logits = noise * 0.1
    elif case.spread == "usual":
        logits = noise * 6
    else:
        logits = noise * 3 - np.arange(case.num_experts) * 0.7
    return torch.from_numpy(logits.astype(np.float32))


def used_token_of(case: Case) -> Tensor | None:
    """[T] int64 of 0 and 1, as DeepSpeed takes it."""
    return (torch.arange(case.num_tokens) % 3 != 1).long() if case.has_unused else None
