"""The usual expert: project up, activate, project down.

n rows, H hidden size, I intermediate size, G = 2I when the activation is gated, else I.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal

import torch
import torch.nn.functional as F

from moeserve.config import Activation, Quantization
from moeserve.experts.activations import activate, is_gated
from moeserve.experts.expert import ExpertShard
from moeserve.kernels import WeightArena

#: how torch's operators are called: x W^T; or W x^T, which keeps the large operand in its natural order (one row as a vector)
Form = Literal["linear", "transposed"]
#: the numbers of rows that a form is chosen for, each up to the next
ROWS: Final = (1, 2, 4, 8, 16, 32, 64)
LINEAR: Final[tuple[Form, ...]] = tuple("linear" for _ in ROWS)


@dataclass(frozen=True, eq=False)
class FeedForward:
    """gate_up_proj [G, H] (gate rows first), down_proj [H, I], gate_up_bias [G] and down_bias [H] or None.

    forms: how to compute each of ROWS rows; which is fastest is a property of the processor.
    """

    activation: Activation
    gate_up_proj: torch.Tensor
    down_proj: torch.Tensor
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None
    forms: tuple[Form, ...] = LINEAR

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Those there are, by name."""
        named = {name: getattr(self, name) for name in ("gate_up_proj", "down_proj", "gate_up_bias", "down_bias")}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def placed(self, arena: WeightArena) -> FeedForward:
        """A copy in `arena`, which has room for it."""
        tensors = {}
        for name, tensor in self.tensors.items():
            space = arena.take(tensor.numel(), tensor.dtype)
            assert space is not None, "there is room for all of them"
            tensors[name] = space.view(tensor.shape).copy_(tensor)
        return self._with(tensors)

    def to(self, device: torch.device) -> FeedForward:
        return self._with({name: tensor.to(device) for name, tensor in self.tensors.items()})

    def _with(self, tensors: Mapping[str, torch.Tensor]) -> FeedForward:
        return replace(self, **tensors)  # type: ignore[arg-type]

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        rows = rows.to(self.gate_up_proj.dtype)
        form = self.forms[bisect_right(ROWS, len(rows)) - 1] if len(rows) else "linear"
        answer = self._transposed(rows) if form == "transposed" else self._linear(rows)
        return self._in_range(rows, answer) if rows.dtype == torch.float16 else answer

    def _linear(self, rows: torch.Tensor) -> torch.Tensor:
        hidden = activate(F.linear(rows, self.gate_up_proj, self.gate_up_bias), self.activation, dim=1)
        return F.linear(hidden, self.down_proj, self.down_bias).float()

    def _transposed(self, rows: torch.Tensor) -> torch.Tensor:
        """[H, n] in, [H, n] out, turned back at the end."""
        columns, bias_shape = (rows[0], (-1,)) if len(rows) == 1 else (rows.t(), (-1, 1))
        projected = self.gate_up_proj @ columns
        if self.gate_up_bias is not None:
            projected += self.gate_up_bias.view(bias_shape)
        answer = self.down_proj @ activate(projected, self.activation, dim=0)
        if self.down_bias is not None:
            answer += self.down_bias.view(bias_shape)
        return answer.t().to(torch.float32, memory_format=torch.contiguous_format).view(rows.shape)

    def _in_range(self, rows: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
        """What left the range of float16 on the way, 65504, once more in float32: weighed, it may well fit."""
        lost = ~answer.isfinite().all(dim=1)
        if lost.any():
            wide = self._with({name: tensor.float() for name, tensor in self.tensors.items()})
            answer[lost] = wide(rows[lost].float())
        return answer


def feed_forward_bytes(
    hidden_size: int,
    intermediate_size: int,
    activation: Activation,
    bias: bool,
    dtype: torch.dtype,
    shard: ExpertShard,
    quantization: Quantization | None = None,
) -> int:
    """Bytes of one shard of a feed-forward expert as a host holds it, known before it is loaded."""
    channels = shard.span(intermediate_size)
    width: int = channels.stop - channels.start
    projected = width * (2 if is_gated(activation) else 1)
    weights, outputs = (projected + width) * hidden_size, projected + hidden_size
    biases = outputs * dtype.itemsize if bias else 0
    if quantization is None:
        return weights * dtype.itemsize + biases
    return weights + outputs * torch.float32.itemsize + biases  # one byte each, and a scale for every output channel
