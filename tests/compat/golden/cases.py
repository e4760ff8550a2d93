"""The whole-layer cases that are recorded from DeepSpeed: parameters, weights and input of each follow from its position."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from torch import nn

GOLDEN = Path(__file__).with_name("deepspeed_moe.safetensors")
HIDDEN, EXPERTS = 8, 6
SHAPES = ((5, HIDDEN), (25, HIDDEN), (2, 15, HIDDEN))


def all_cases() -> list[dict[str, Any]]:
    """Parameters of `MoE` beside hidden_size and expert; nothing in them is left to chance.

    Which tokens K = 1 drops is undefined there: it keeps what `torch.topk` returns among equals.
    """
    grid = itertools.product((1, 2, 3), (0.5, 1.25), (0, 4), (True, False), (True, False))
    names = ("k", "eval_capacity_factor", "min_capacity", "drop_tokens", "use_residual")
    cases = [dict(zip(names, values, strict=True)) for values in grid]
    certain = {"num_experts": EXPERTS, "use_rts": False, "top2_2nd_expert_sampling": False}
    return [{**case, **certain} for case in cases]


def expert() -> nn.Module:
    return nn.Sequential(nn.Linear(HIDDEN, 16), nn.GELU(), nn.Linear(16, HIDDEN))


def fill(layer: nn.Module, index: int) -> None:
    """Weights that follow from the case alone, whatever order a layer makes its parameters in."""
    generator = torch.Generator().manual_seed(index)
    with torch.no_grad():
        for _, parameter in sorted(layer.named_parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)


def hidden_states(index: int) -> torch.Tensor:
    return torch.randn(SHAPES[index % len(SHAPES)], generator=torch.Generator().manual_seed(1000 + index))
