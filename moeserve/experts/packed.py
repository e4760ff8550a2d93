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
from typing import Final, TypeGuard

import numpy as np
import numpy.typing as npt
import torch

from moeserve.config import Activation, Kernel
from moeserve.errors import ConfigError, InvalidRequest
from moeserve.experts.activations import is_gated
from moeserve.experts.expert import Expert
from moeserve.experts.feed_forward import FeedForward
from moeserve.kernels import (
    KERNELS,
    TYPES,
    Arena,
    Bank,
    Work,
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
_FUNCTIONS: Final[Mapping[Activation, int]] = {"swiglu": 0, "swigluoai": 2, "geglu": 3, "gelu": 5, "relu": 6}


@dataclass(frozen=True, eq=False)
class _Packed:
    """One expert: up and down flat, in panels; biases [P * 32] float32 in the order of the panels, or None."""

    intermediate_size: int
    up: torch.Tensor
    down: torch.Tensor
    up_bias: torch.Tensor | None
    down_bias: torch.Tensor | None


class PackedExperts:
    """Experts of one type of weights, activation and hidden size, each of its own intermediate size, on the CPU.

    kernel: the one that computes. Every sum runs over all input channels in one accumulator, so an answer is bitwise the same whatever
    else is computed with it, and by however many threads.
    """

    def __init__(self, kernel: str, room_for: int) -> None:
        self.kernel = kernel
        self._room_for = room_for
        self._experts: list[_Packed] = []
        self._arena: Arena | None = None

    def takes(self, expert: object) -> TypeGuard[FeedForward]:
        """Whether it is of the kind that those here are of."""
        return can_pack(expert) and (not self._experts or _kind(expert) == (self.activation, self.dtype, self.hidden_size))

    def add(self, expert: FeedForward) -> None:
        """Pack it; the original is not kept, so that loading them one by one never holds the weights twice."""
        self.activation, self.dtype, self.hidden_size = _kind(expert)
        self._experts.append(self._packed(expert, max(1, self._room_for - len(self._experts))))
        self.__dict__.pop("_bank", None)

    def computed_by(self, kernel: str) -> PackedExperts:
        """The same experts, and another kernel."""
        twin = self._twin()
        twin.kernel = kernel
        return twin

    @property
    def num_experts(self) -> int:
        return len(self._experts)

    def expert(self, slot: int) -> FeedForward:
        """A copy in the usual order."""
        packed, parts, inner = self._experts[slot], self._parts, self._experts[slot].intermediate_size
        return FeedForward(
            self.activation,
            from_panels(packed.up, parts, inner, self.hidden_size),
            from_panels(packed.down, 1, self.hidden_size, inner),
            None if packed.up_bias is None else bias_from_panels(packed.up_bias, parts, inner).to(self.dtype),
            None if packed.down_bias is None else bias_from_panels(packed.down_bias, 1, self.hidden_size).to(self.dtype),
        )

    def replaced(self, changes: Mapping[int, Expert]) -> PackedExperts:
        """The same with other experts in the slots of `changes`; the rest is shared. Raises ConfigError when one is of another kind."""
        twin = self._twin()
        twin._arena = None
        for done, (slot, expert) in enumerate(changes.items()):
            if not self.takes(expert):
                raise ConfigError(f"the new expert of slot {slot} is of another kind or size than the one it replaces")
            twin._experts[slot] = twin._packed(expert, len(changes) - done)
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
        """hidden_states [R, H] in the type of the weights, row_index [N] int64, tokens_per_expert [E], input_weights [N] float32 or None
        (what rows are multiplied by, rounded to their type), weights [N] float32 (what answers are multiplied by), out [R, H] float32,
        overwritten.

        Raises InvalidRequest when `row_index` names a row that is not there.
        """
        code = library()
        assert code is not None and out.is_contiguous(), "found before the experts were packed"
        assert tokens_per_expert.sum() == len(row_index) == len(weights), "what is read is there"
        hidden_states, row_index, weights = hidden_states.contiguous(), row_index.contiguous(), weights.contiguous()
        tokens_per_expert = np.ascontiguousarray(tokens_per_expert, dtype=np.int64)
        work = Work(
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

    def _packed(self, expert: FeedForward, left: int) -> _Packed:
        parts, inner = self._parts, expert.down_proj.shape[1]
        return _Packed(
            inner,
            self._placed(to_panels(expert.gate_up_proj, parts), left, expert),
            self._placed(to_panels(expert.down_proj), left, expert),
            None if expert.gate_up_bias is None else bias_to_panels(expert.gate_up_bias, parts),
            None if expert.down_bias is None else bias_to_panels(expert.down_bias),
        )

    def _placed(self, panels: torch.Tensor, left: int, expert: FeedForward) -> torch.Tensor:
        """In the arena; a new one, for as many as are left, where there is none or the sizes differ."""
        space = None if self._arena is None else self._arena.take(panels.numel(), panels.dtype)
        if space is None:
            size = self.dtype.itemsize
            width, hidden = padded(expert.down_proj.shape[1]), padded(expert.down_proj.shape[0])
            self._arena = Arena(left * (aligned(self._parts * width * hidden * size) + aligned(width * hidden * size)))
            space = self._arena.take(panels.numel(), panels.dtype)
            assert space is not None, "the arena has room for one expert at least"
        space.view(panels.shape).copy_(panels)
        return space

    @cached_property
    def _bank(self) -> Bank:
        sizes = (ctypes.c_int64 * len(self._experts))(*(expert.intermediate_size for expert in self._experts))
        nothing = [None] * len(self._experts)
        return Bank(
            kernel=find_kernel(self.kernel, TYPES[self.dtype]),
            type=TYPES[self.dtype],
            rows_type=TYPES[self.dtype],
            is_gated=is_gated(self.activation),
            function=_FUNCTIONS[self.activation],
            limit=7.0 if self.activation == "swigluoai" else math.inf,
            hidden_size=self.hidden_size,
            intermediate_size=sizes,
            up=_addresses([expert.up for expert in self._experts]),
            down=_addresses([expert.down for expert in self._experts]),
            up_scale=_addresses(nothing),
            down_scale=_addresses(nothing),
            up_bias=_addresses([expert.up_bias for expert in self._experts]),
            down_bias=_addresses([expert.down_bias for expert in self._experts]),
        )


def can_pack(expert: object) -> TypeGuard[FeedForward]:
    """Whether the compiled pass knows its activation and type of weights, on the CPU."""
    if not isinstance(expert, FeedForward) or expert.gate_up_proj.device.type != "cpu":
        return False
    return expert.activation in _FUNCTIONS and expert.gate_up_proj.dtype in TYPES


def kernels_for(dtype: torch.dtype, activation: Activation, kernel: Kernel) -> tuple[str, ...]:
    """Those to choose from. Raises ConfigError when one that is asked for cannot run."""
    if kernel == "torch":
        return ()
    there = tuple(name for name in KERNELS if activation in _FUNCTIONS and dtype in TYPES and find_kernel(name, TYPES[dtype]))
    if kernel != "auto":
        if kernel not in there:
            name = str(dtype).removeprefix("torch.")
            allowed = ", ".join(("auto", "torch", *there))
            raise ConfigError(f"model.kernel is {kernel!r}, which cannot compute {name} {activation} experts here; allowed: {allowed}")
        return (kernel,)
    # What runs everywhere is only worth trying where nothing better does.
    return tuple(name for name in there if name != "generic") or there


def _kind(expert: FeedForward) -> tuple[Activation, torch.dtype, int]:
    return expert.activation, expert.gate_up_proj.dtype, expert.down_proj.shape[0]


def _addresses(tensors: Sequence[torch.Tensor | None]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*(None if tensor is None else tensor.data_ptr() for tensor in tensors))
