"""What stands between the two projections of an expert."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from moeserve.config import Activation

_ALPHA, _LIMIT = 1.702, 7.0


def _swigluoai(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """gpt-oss (OpenAI 2025): both halves clamped, sigmoid(1.702 x) in place of sigmoid(x), and 1 added to what is gated."""
    gate, up = gate.clamp(max=_LIMIT), up.clamp(-_LIMIT, _LIMIT)
    return up.add_(1).mul_(gate * torch.sigmoid(gate * _ALPHA))


def _glu(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """f(gate) * up: Shazeer 2020, "GLU Variants Improve Transformer"."""

    def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return function(gate).mul_(up)

    return gated


_GATED: dict[Activation, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "swiglu": _glu(F.silu),
    "geglu": _glu(F.gelu),
    "swigluoai": _swigluoai,
}
_POINTWISE: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {"gelu": F.gelu, "relu": F.relu}


def is_gated(activation: Activation) -> bool:
    """Whether the first projection has a gate half and an up half (2I rows) or one part only (I rows)."""
    return activation in _GATED


def activate(projected: torch.Tensor, activation: Activation, dim: int) -> torch.Tensor:
    """Output of the first projection, 2I (gated) or I wide along `dim`, to I wide."""
    if activation not in _GATED:
        return _POINTWISE[activation](projected)
    gate, up = projected.chunk(2, dim=dim)
    return _GATED[activation](gate, up)
