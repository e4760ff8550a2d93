"""What stands between the two projections of an expert; L the limit of those that have one."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from moeserve.config import Activation, ActivationName, parsed_activation

_ALPHA = 1.702
Gated = Callable[[torch.Tensor, torch.Tensor, float | None], torch.Tensor]


def _swiglu(gate: torch.Tensor, up: torch.Tensor, limit: float | None) -> torch.Tensor:
    """silu(gate) * up: Shazeer 2020, "GLU Variants Improve Transformer". DeepSeek-V4 has a limit: gate is at most L, up within -L..L."""
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return F.silu(gate).mul_(up)


def _swiglu_post(gate: torch.Tensor, up: torch.Tensor, limit: float | None) -> torch.Tensor:
    """The same with silu(gate) at most L in place of gate: Step 3.5."""
    if limit is None:
        return _swiglu(gate, up, limit)
    return F.silu(gate).clamp_(max=limit).mul_(up.clamp(-limit, limit))


def _swigluoai(gate: torch.Tensor, up: torch.Tensor, limit: float | None) -> torch.Tensor:
    """gpt-oss (OpenAI 2025): both halves clamped, sigmoid(1.702 x) in place of sigmoid(x), and 1 added to what is gated."""
    assert limit is not None, "it has one when none is given"
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return up.add_(1).mul_(gate * torch.sigmoid(gate * _ALPHA))


def _geglu(gate: torch.Tensor, up: torch.Tensor, limit: float | None) -> torch.Tensor:
    return F.gelu(gate).mul_(up)


def _geglu_tanh(gate: torch.Tensor, up: torch.Tensor, limit: float | None) -> torch.Tensor:
    """With the approximation by tanh: Gemma."""
    return F.gelu(gate, approximate="tanh").mul_(up)


def _relu2(hidden: torch.Tensor) -> torch.Tensor:
    """So et al. 2021, "Primer" (arXiv 2109.08668): Nemotron."""
    return F.relu(hidden).square_()


_GATED: dict[ActivationName, Gated] = {
    "swiglu": _swiglu,
    "swiglu_post": _swiglu_post,
    "swigluoai": _swigluoai,
    "geglu": _geglu,
    "geglu_tanh": _geglu_tanh,
}
_POINTWISE: dict[ActivationName, Callable[[torch.Tensor], torch.Tensor]] = {"gelu": F.gelu, "relu": F.relu, "relu2": _relu2}


def is_gated(activation: Activation) -> bool:
    """Whether the first projection has a gate half and an up half (2I rows) or one part only (I rows)."""
    return parsed_activation(activation)[0] in _GATED


def activate(projected: torch.Tensor, activation: Activation, dim: int) -> torch.Tensor:
    """Output of the first projection, 2I (gated) or I wide along `dim`, to I wide."""
    name, limit = parsed_activation(activation)
    if name not in _GATED:
        return _POINTWISE[name](projected)
    gate, up = projected.chunk(2, dim=dim)
    return _GATED[name](gate, up, limit)
