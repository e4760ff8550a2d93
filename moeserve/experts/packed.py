"""One call of the compiled pass for all experts of one kind.

R rows, N (row, expert) pairs, H hidden size.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import torch

from moeserve.config import ActivationName, parsed_activation
from moeserve.errors import InvalidRequest
from moeserve.experts.activations import is_gated
from moeserve.experts.packed_expert import PackedExpert
from moeserve.experts.pairs import Pairs
from moeserve.kernels import TYPES, Bank, PassPairs, PassWork, find_kernel, library, scratch

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

_MISSING: Final = {-1: "a row", -2: "an expert"}
_NO_MEMORY: Final = -3


class PackedExperts:
    """Experts of one kind, each of its own intermediate size, on the CPU: their addresses, for the kernel of their kind.

    Every sum runs over all input channels in one accumulator, so an answer is bitwise the same whatever else is computed with it, and by
    however many threads.
    """

    def __init__(self, held: Sequence[PackedExpert]) -> None:
        self.held = held
        self._kind = held[0].kind
        self._bank = _bank(held)

    @property
    def kernel(self) -> str:
        """The one that computes."""
        return self._kind.kernel

    def takes(self, hidden_states: torch.Tensor, row_index: torch.Tensor, local_experts: torch.Tensor, out: torch.Tensor) -> bool:
        """Whether `run_pairs` reads these as they are."""
        return (
            hidden_states.dtype is self._kind.rows_dtype
            and row_index.dtype is local_experts.dtype is torch.int32
            and hidden_states.is_contiguous()
            and out.is_contiguous()
        )

    def run_pairs(
        self, hidden_states: torch.Tensor, row_index: torch.Tensor, local_experts: torch.Tensor, weights: torch.Tensor, out: torch.Tensor
    ) -> None:
        """As `LayerBank.run` with pairs of these experts alone, which are counted on the way: a few rows take no other call.

        Raises InvalidRequest when a pair names a row or an expert that is not there, and MemoryError.
        """
        code = library()
        assert code is not None and row_index.numel() == local_experts.numel() == weights.numel(), "what is read is there"
        asked = PassPairs(
            *(row_index.numel(), hidden_states.shape[0], len(self.held)),
            *(hidden_states.data_ptr(), row_index.data_ptr(), local_experts.data_ptr(), weights.data_ptr(), out.data_ptr()),
            torch.get_num_threads(),
        )
        failure = code.run_pairs(self._bank, asked)
        if failure == _NO_MEMORY:
            raise MemoryError("there is no memory for a pass")
        if failure:
            raise InvalidRequest(f"a pair names {_MISSING[failure]} that is not there")

    def run(self, hidden_states: torch.Tensor, pairs: Pairs, out: torch.Tensor, adds: bool) -> None:
        """Gathers rows, computes them, weighs the answers and sums them into `out`.

        hidden_states [R, H] of any float type; out [R, H] float32, overwritten, or added to if it `adds`. Raises InvalidRequest when
        `pairs` name a row that is not there.
        """
        code = library()
        assert code is not None and out.is_contiguous(), "found before the experts were packed"
        assert pairs.tokens_per_expert.sum() == len(pairs.row_index) == len(pairs.weights), "what is read is there"
        hidden_states = hidden_states.to(self._kind.rows_dtype).contiguous()
        row_index, weights, input_weights = pairs.row_index.contiguous(), pairs.weights.contiguous(), pairs.input_weights
        tokens_per_expert = np.ascontiguousarray(pairs.tokens_per_expert, dtype=np.int64)
        work = PassWork(
            num_pairs=len(row_index),
            num_rows=len(hidden_states),
            hidden_states=hidden_states.data_ptr(),
            row_index=row_index.data_ptr(),
            tokens_per_expert=tokens_per_expert.ctypes.data,
            num_experts=len(self.held),
            input_weights=None if input_weights is None else input_weights.data_ptr(),
            weights=weights.data_ptr(),
            out=out.data_ptr(),
            num_threads=torch.get_num_threads(),
            adds=adds,
        )
        space = scratch(code.scratch_bytes(self._bank, work))
        work.scratch = space.data_ptr()
        if code.run_pass(self._bank, work):
            raise InvalidRequest(f"a pair names a row that is not there; allowed: 0..{len(hidden_states) - 1}")


def _bank(held: Sequence[PackedExpert]) -> Bank:
    kind = held[0].kind
    name, limit = parsed_activation(kind.activation)
    return Bank(
        kernel=find_kernel(kind.kernel, TYPES[kind.dtype]),
        type=TYPES[kind.dtype],
        rows_type=TYPES[kind.rows_dtype],
        is_gated=is_gated(kind.activation),
        function=FUNCTIONS[name],
        limit=math.inf if limit is None else limit,
        hidden_size=kind.hidden_size,
        intermediate_size=(ctypes.c_int64 * len(held))(*(expert.intermediate_size for expert in held)),
        up=_addresses([expert.up for expert in held]),
        down=_addresses([expert.down for expert in held]),
        up_scale=_addresses([expert.up_scales for expert in held]),
        down_scale=_addresses([expert.down_scales for expert in held]),
        up_bias=_addresses([expert.up_bias for expert in held]),
        down_bias=_addresses([expert.down_bias for expert in held]),
    )


def _addresses(tensors: Sequence[torch.Tensor | None]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*(None if tensor is None else tensor.data_ptr() for tensor in tensors))
