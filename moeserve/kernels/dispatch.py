"""The pairs of each host in one call (csrc/dispatch.c), where the compiled code was built.

T tokens, E experts, K choices per token, N pairs, P physical experts, D hosts.
"""

from __future__ import annotations

from ctypes import Structure, byref, c_int64, c_void_p
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from moeserve.kernels.native import library

Integers = npt.NDArray[np.integer]
#: the token, the physical expert and the weight of each
Pairs = tuple[Integers, Integers, npt.NDArray[np.float32]]


class DispatchWork(Structure):
    """struct dispatch of csrc/dispatch.c."""

    _fields_ = (
        *((name, c_int64) for name in ("num_tokens", "num_pairs", "num_physical", "num_hosts")),
        *((name, c_void_p) for name in ("tokens", "physical", "weights", "host_of_physical", "shared_host", "shared_weights")),
        *((name, c_void_p) for name in ("rows", "row_index", "local_experts", "pair_weights", "row_ends", "pair_ends", "space")),
    )


class Dispatched(NamedTuple):
    """Pairs host by host; row_ends and pair_ends [D]: where those of each host end."""

    rows: npt.NDArray[np.int64]
    row_index: npt.NDArray[np.int32]
    local_experts: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    row_ends: list[int]
    pair_ends: list[int]


class ChoicesWork(Structure):
    """struct choices of csrc/dispatch.c."""

    _fields_ = (
        *((name, c_int64) for name in ("num_tokens", "top_k", "num_experts")),
        *((name, c_void_p) for name in ("topk_ids", "topk_weights", "kept", "first_physical", "tokens", "physical", "weights")),
    )


class Places:
    """Where experts are, for the functions below: first_physical [E], the first copy of each; host_of_physical [P], ascending; D hosts."""

    def __init__(self, first_physical: Integers, host_of_physical: Integers, num_hosts: int) -> None:
        self._kept = np.ascontiguousarray(first_physical, np.int64), np.ascontiguousarray(host_of_physical, np.int64)
        self.num_hosts = num_hosts
        self.num_experts, self.num_physical = map(len, self._kept)
        # Asking NumPy for an address costs more than making an array.
        self.first_physical, self.host_of_physical = (array.ctypes.data for array in self._kept)


def pairs_of(topk_ids: torch.Tensor, topk_weights: torch.Tensor, kept: torch.Tensor, places: Places) -> Pairs | None:
    """Token, physical expert and weight of each kept choice [T, K] of an expert that has a place; None without compiled code."""
    code, (num_tokens, top_k) = library(), topk_ids.shape
    if code is None or not (topk_ids.is_contiguous() and topk_weights.is_contiguous() and kept.is_contiguous()):
        return None
    found, weights = np.empty((2, num_tokens * top_k), np.int64), np.empty(num_tokens * top_k, np.float32)
    at = found.ctypes.data
    choices = (tensor.data_ptr() for tensor in (topk_ids, topk_weights, kept))
    sizes = num_tokens, top_k, places.num_experts
    work = ChoicesWork(*sizes, *choices, places.first_physical, at, at + 8 * num_tokens * top_k, weights.ctypes.data)
    count = code.pairs_of(byref(work))
    return found[0, :count], found[1, :count], weights[:count]


def dispatch_pairs(
    pairs: Pairs, num_tokens: int, places: Places, shared: tuple[Integers, npt.NDArray[np.float32]] | None
) -> Dispatched | None:
    """Pairs by host and, within it, by expert; None where there is no compiled code.

    pairs: the token, the physical expert and the weight of each, [N]. shared: the host, -1 = none, and the weight of each token, [T], whose
    pairs with the expert behind the last of their host come last there.
    """
    code = library()
    if code is None:
        return None
    tokens, physical, weights = (
        np.ascontiguousarray(each, dtype) for each, dtype in zip(pairs, (np.int64, np.int64, np.float32), strict=True)
    )
    count, num_hosts = len(tokens), places.num_hosts
    most = count if shared is None else count + num_tokens
    numbers = np.empty(most + 2 * num_hosts + places.num_physical + 1 + count + num_tokens, np.int64)
    small = np.empty((3, most), np.int32)
    at, small_at, kept = numbers.ctypes.data, small.ctypes.data, None
    addresses: tuple[int | None, int | None] = None, None
    if shared is not None:
        kept = np.ascontiguousarray(shared[0], np.int64), np.ascontiguousarray(shared[1], np.float32)
        addresses = kept[0].ctypes.data, kept[1].ctypes.data
    work = DispatchWork(
        *(num_tokens, count, places.num_physical, num_hosts),
        *(tokens.ctypes.data, physical.ctypes.data, weights.ctypes.data, places.host_of_physical, *addresses),
        *(at, small_at, small_at + 4 * most, small_at + 8 * most),
        *(at + 8 * most, at + 8 * (most + num_hosts), at + 8 * (most + 2 * num_hosts)),
    )
    code.dispatch_pairs(byref(work))
    ends = numbers[most : most + 2 * num_hosts].tolist()
    return Dispatched(numbers[:most], small[0], small[1], small[2].view(np.float32), ends[:num_hosts], ends[num_hosts:])


class MessageWork(Structure):
    """struct message of csrc/dispatch.c."""

    _fields_ = (
        *((name, c_int64) for name in ("num_rows", "row_bytes", "num_pairs")),
        *((name, c_void_p) for name in ("hidden_states", "rows", "row_index", "local_experts", "weights")),
        *((name, c_void_p) for name in ("to_rows", "to_row_index", "to_local_experts", "to_weights")),
    )


def write_message(
    hidden_states: torch.Tensor, rows: torch.Tensor, pairs: tuple[torch.Tensor, torch.Tensor, torch.Tensor], to: tuple[int, ...]
) -> bool:
    """The `rows` [R] int64 of hidden_states [T, H], and pairs [N]: int32, int32, float32, each to its address in `to`.

    False, and nothing done, where there is no compiled code, or the rows are not in this process's memory as they are sent.
    """
    code, (row_index, local_experts, weights) = library(), pairs
    if code is None or not (hidden_states.is_cpu and hidden_states.is_contiguous() and weights.is_contiguous()):
        return False
    assert rows.dtype == torch.int64 and weights.dtype == torch.float32
    row_index, local_experts = row_index.int().contiguous(), local_experts.int().contiguous()
    sizes = rows.numel(), hidden_states.shape[1] * hidden_states.element_size(), row_index.numel()
    sources = hidden_states, rows, row_index, local_experts, weights
    code.write_message(byref(MessageWork(*sizes, *(source.data_ptr() for source in sources), *to)))
    return True
