"""A feed-forward expert in the order in which the compiled pass reads it: csrc/kernels.h says which.

H hidden size, I intermediate size, P panels of 32 output channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from moeserve.config import Activation
from moeserve.experts.activations import is_gated
from moeserve.experts.feed_forward import FeedForward
from moeserve.experts.packable import Packable, unpacked
from moeserve.experts.quantized import QuantizedFeedForward
from moeserve.kernels import (
    WeightArena,
    WeightArenas,
    aligned,
    bias_from_panels,
    bias_to_panels,
    from_panels,
    padded,
    to_panels,
)


class PackedKind(NamedTuple):
    """What experts that are computed in one pass have in common; kernel: the one that computes them."""

    kernel: str
    activation: Activation
    dtype: torch.dtype
    rows_dtype: torch.dtype
    hidden_size: int

    @property
    def parts(self) -> int:
        """Halves of the first projection."""
        return 2 if is_gated(self.activation) else 1


@dataclass(frozen=True, eq=False)
class PackedExpert:
    """Weights flat, in panels; scales and biases [P * 32] float32 in the order of the panels, or None. nbytes: before it was packed."""

    kind: PackedKind
    nbytes: int
    intermediate_size: int
    up: torch.Tensor
    down: torch.Tensor
    up_scales: torch.Tensor | None
    down_scales: torch.Tensor | None
    up_bias: torch.Tensor | None
    down_bias: torch.Tensor | None
    bias_dtype: torch.dtype

    def expert(self) -> FeedForward | QuantizedFeedForward:
        """A copy in the usual order."""
        parts, inner, hidden = self.kind.parts, self.intermediate_size, self.kind.hidden_size

        def of_channels(panels: torch.Tensor | None, parts: int, outputs: int, dtype: torch.dtype) -> torch.Tensor | None:
            return None if panels is None else bias_from_panels(panels, parts, outputs).to(dtype)

        whole = Packable(
            self.kind.activation,
            self.kind.rows_dtype,
            from_panels(self.up, parts, inner, hidden),
            from_panels(self.down, 1, hidden, inner),
            of_channels(self.up_scales, parts, inner, torch.float32),
            of_channels(self.down_scales, 1, hidden, torch.float32),
            of_channels(self.up_bias, parts, inner, self.bias_dtype),
            of_channels(self.down_bias, 1, hidden, self.bias_dtype),
        )
        return unpacked(whole)


def pack(expert: Packable, kernel: str, nbytes: int, arenas: WeightArenas) -> PackedExpert:
    """A packed copy for `kernel` in the next place of `arenas`; nbytes: of the weights as they were."""
    kind = PackedKind(kernel, *expert.kind)
    (hidden, inner), size = expert.down_proj.shape, kind.dtype.itemsize
    channels = padded(inner) * padded(hidden)
    arena = arenas.arena(aligned(kind.parts * channels * size) + aligned(channels * size))

    def of_channels(values: torch.Tensor | None, parts: int) -> torch.Tensor | None:
        return None if values is None else bias_to_panels(values, parts)

    return PackedExpert(
        kind,
        nbytes,
        inner,
        _placed(to_panels(expert.gate_up_proj, kind.parts), arena),
        _placed(to_panels(expert.down_proj), arena),
        of_channels(expert.gate_up_scales, kind.parts),
        of_channels(expert.down_scales, 1),
        of_channels(expert.gate_up_bias, kind.parts),
        of_channels(expert.down_bias, 1),
        torch.float32 if expert.down_bias is None else expert.down_bias.dtype,
    )


def _placed(panels: torch.Tensor, arena: WeightArena) -> torch.Tensor:
    space = arena.take(panels.numel(), panels.dtype)
    assert space is not None, "it was asked for with room for both projections"
    space.view(panels.shape).copy_(panels)
    return space
