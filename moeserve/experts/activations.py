"""What stands between the two projections of an expert."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from moeserve.config import Activation

#: name -> (point-wise function, gated?). Gated (Shazeer 2020, "GLU Variants Improve Transformer"): f(gate) * up.
_TABLE: dict[Activation, tuple[Callable[[torch.Tensor], torch.Tensor], bool]] = {
    "swiglu": (F.silu, True),
    "geglu": (F.gelu, True),
    "gelu": (F.gelu, False),
    "relu": (F.relu, False),
}


def is_gated(activation: Activation) -> bool:
    """Whether the first projection has a gate half and an up half (2I rows) or one part only (I rows)."""
    return _TABLE[activation][1]


def activate(projected: torch.Tensor, activation: Activation, dim: int) -> torch.Tensor:
    """Output of the first projection, 2I (gated) or I wide along `dim`, to I wide."""
    function, gated = _TABLE[activation]
    if not gated:
        return function(projected)
    gate, up = projected.chunk(2, dim=dim)
    return function(gate).mul_(up)
