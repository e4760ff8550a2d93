"""Feed-forward experts in the order in which the compiled pass reads them: csrc/kernels.h says which.

E experts, R rows, N (row, expert) pairs, H hidden size, I intermediate size, O output and K input channels of a projection,
P panels of 32 output channels.
"""

from __future__ import annotations

import copy
import ctypes
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from moeserve.config import ActivationName, parsed_activation
from moeserve.errors import ConfigError, InvalidRequest
from moeserve.experts.activations import is_gated
from moeserve.experts.expert import Expert
from moeserve.experts.feed_forward import FeedForward
from moeserve.experts.packable import Packable, packable, unpacked
from moeserve.experts.quantized import QuantizedFeedForward
from moeserve.kernels import (
    TYPES,
    Bank,
    PassWork,
    WeightArena,
    aligned,
    bias_from_panels,
    bias_to_panels,
    find_kernel,
    from_panels,
    library,
    padded,
    scratch,
    to_panels,
)

#: the numbers that csrc/kernels.h gives to activations
FUNCTIONS: Final[Mapping[ActivationName, int]] = {
    "swiglu": 0,
    "swiglu_post": 1,
    "swigluoai": 2,
    "geglu": 3,
    "geglu_tanh": 4,
    "gelu": 5,
    "relu": 6,
    "relu2": 7,
}


@dataclass(frozen=True, eq=False)
class _Packed:
    """One expert: weights flat, in panels; scales and biases [P * 32] float32 in the order of the panels, or None."""

    intermediate_size: int
    up: torch.Tensor
    down: torch.Tensor
    up_scales: torch.Tensor | None
    down_scales: torch.Tensor | None
    up_bias: torch.Tensor | None
    down_bias: torch.Tensor | None
    bias_dtype: torch.dtype


class PackedExperts:
    """Experts of one type of weights, activation and hidden size, each of its own intermediate size, on the CPU.

    kernel: the one that computes. Every sum runs over all input channels in one accumulator, so an answer is bitwise the same whatever
    else is computed with it, and by however many threads.
    """

    def __init__(self, kernel: str, room_for: int) -> None:
        self.kernel = kernel
        self._room_for = room_for
        self._experts: list[_Packed] = []
        self._arena: WeightArena | None = None

    def takes(self, expert: Packable) -> bool:
        """Whether it is of the kind that those here are of."""
        return not self._experts or expert.kind == (self.activation, self.dtype, self.rows_dtype, self.hidden_size)

    def add(self, expert: Packable) -> None:
        """Pack it; the original is not kept, so that loading them one by one never holds the weights twice."""
        self.activation, self.dtype, self.rows_dtype, self.hidden_size = expert.kind
        self._experts.append(self._packed(expert, max(1, self._room_for - len(self._experts))))
        self.__dict__.pop("_bank", None)

    def computed_by(self, kernel: str) -> PackedExperts:
        """The same experts, and another kernel."""
        twin = self._twin()
        twin.kernel = kernel
        return twin

    @property
    def num_experts(self) -> int:
        """How many are packed."""
        return len(self._experts)

    def expert(self, index: int) -> FeedForward | QuantizedFeedForward:
        """A copy in the usual order."""
        packed, parts, hidden = self._experts[index], self._parts, self.hidden_size
        inner = packed.intermediate_size

        def of_channels(panels: torch.Tensor | None, parts: int, outputs: int, dtype: torch.dtype) -> torch.Tensor | None:
            return None if panels is None else bias_from_panels(panels, parts, outputs).to(dtype)

        whole = Packable(
            self.activation,
            self.rows_dtype,
            from_panels(packed.up, parts, inner, hidden),
            from_panels(packed.down, 1, hidden, inner),
            of_channels(packed.up_scales, parts, inner, torch.float32),
            of_channels(packed.down_scales, 1, hidden, torch.float32),
            of_channels(packed.up_bias, parts, inner, packed.bias_dtype),
            of_channels(packed.down_bias, 1, hidden, packed.bias_dtype),
        )
        return unpacked(whole)

    def replaced(self, changes: Mapping[int, Expert]) -> PackedExperts:
        """The same with other experts at the indices of `changes`; the rest is shared. Raises ConfigError when one is of another kind."""
        twin = self._twin()
        twin._arena = None
        for done, (index, expert) in enumerate(changes.items()):
            whole = packable(expert)
            if whole is None or not self.takes(whole):
                raise ConfigError(f"the new local expert {index} is of another kind or size than the one it replaces")
            twin._experts[index] = twin._packed(whole, len(changes) - done)
        return twin

    def run(
        self,
        hidden_states: torch.Tensor,
        row_index: torch.Tensor,
        tokens_per_expert: npt.NDArray[np.int64],
        input_weights: torch.Tensor | None,
        weights: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Gathers rows, computes them, weighs the answers and sums them into `out`.

        hidden_states [R, H] of any float type, row_index [N] int64, tokens_per_expert [E], input_weights [N] float32 or None
        (what rows are multiplied by, rounded to their type), weights [N] float32 (what answers are multiplied by), out [R, H] float32,
        overwritten. Raises InvalidRequest when `row_index` names a row that is not there.
        """
        code = library()
        assert code is not None and out.is_contiguous(), "found before the experts were packed"
        assert tokens_per_expert.sum() == len(row_index) == len(weights), "what is read is there"
        hidden_states, row_index, weights = hidden_states.to(self.rows_dtype).contiguous(), row_index.contiguous(), weights.contiguous()
        tokens_per_expert = np.ascontiguousarray(tokens_per_expert, dtype=np.int64)
        work = PassWork(
            num_pairs=len(row_index),
            num_rows=len(hidden_states),
            hidden_states=hidden_states.data_ptr(),
            row_index=row_index.data_ptr(),
            tokens_per_expert=tokens_per_expert.ctypes.data,
            num_experts=len(self._experts),
            input_weights=None if input_weights is None else input_weights.data_ptr(),
            weights=weights.data_ptr(),
            out=out.data_ptr(),
            num_threads=torch.get_num_threads(),
        )
        space = scratch(code.scratch_bytes(self._bank, work))
        work.scratch = space.data_ptr()
        if code.run_pass(self._bank, work):
            raise InvalidRequest(f"a pair names a row that is not there; allowed: 0..{len(hidden_states) - 1}")

    def _twin(self) -> PackedExperts:
        twin = copy.copy(self)
        twin.__dict__.pop("_bank", None)
        twin._experts = list(self._experts)
        return twin

    @property
    def _parts(self) -> int:
        return 2 if is_gated(self.activation) else 1

    def _packed(self, expert: Packable, left: int) -> _Packed:
        def of_channels(values: torch.Tensor | None, parts: int) -> torch.Tensor | None:
            return None if values is None else bias_to_panels(values, parts)

        return _Packed(
            expert.down_proj.shape[1],
            self._placed(to_panels(expert.gate_up_proj, self._parts), left, expert),
            self._placed(to_panels(expert.down_proj), left, expert),
            of_channels(expert.gate_up_scales, self._parts),
            of_channels(expert.down_scales, 1),
            of_channels(expert.gate_up_bias, self._parts),
            of_channels(expert.down_bias, 1),
            torch.float32 if expert.down_bias is None else expert.down_bias.dtype,
        )

    def _placed(self, panels: torch.Tensor, left: int, expert: Packable) -> torch.Tensor:
        """In the arena; a new one, for as many as are left, where there is none or the sizes differ."""
        space = None if self._arena is None else self._arena.take(panels.numel(), panels.dtype)
        if space is None:
            size = self.dtype.itemsize
            hidden, width = (padded(channels) for channels in expert.down_proj.shape)
            self._arena = WeightArena(left * (aligned(self._parts * width * hidden * size) + aligned(width * hidden * size)))
            space = self._arena.take(panels.numel(), panels.dtype)
            assert space is not None, "the arena has room for one expert at least"
        space.view(panels.shape).copy_(panels)
        return space

    @cached_property
    def _bank(self) -> Bank:
        every = self._experts
        name, limit = parsed_activation(self.activation)
        return Bank(
            kernel=find_kernel(self.kernel, TYPES[self.dtype]),
            type=TYPES[self.dtype],
            rows_type=TYPES[self.rows_dtype],
            is_gated=is_gated(self.activation),
            function=FUNCTIONS[name],
            limit=math.inf if limit is None else limit,
            hidden_size=self.hidden_size,
            intermediate_size=(ctypes.c_int64 * len(every))(*(expert.intermediate_size for expert in every)),
            up=_addresses([expert.up for expert in every]),
            down=_addresses([expert.down for expert in every]),
            up_scale=_addresses([expert.up_scales for expert in every]),
            down_scale=_addresses([expert.down_scales for expert in every]),
            up_bias=_addresses([expert.up_bias for expert in every]),
            down_bias=_addresses([expert.down_bias for expert in every]),
        )


def _addresses(tensors: Sequence[torch.Tensor | None]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*(None if tensor is None else tensor.data_ptr() for tensor in tensors))
