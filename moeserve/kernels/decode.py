"""Tiles of weights in few bits, decoded by the compiled code (csrc/decode.c)."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_int32, c_int64, c_void_p
from functools import cache

import torch

from moeserve.kernels.native import library

_NO_ROOM = "there is no room for a row of weights"


class CodedTile(Structure):
    """struct coded of csrc/decode.c."""

    _fields_ = (
        ("code", c_int32),
        ("to_bf16", c_int32),
        ("first_row", c_int64),
        ("rows", c_int64),
        ("bytes", c_int64),
        ("codes", c_void_p),
        ("scales", c_void_p),
        ("zeros", c_void_p),
        ("groups", c_int64),
        ("group_size", c_int64),
        ("row_size", c_int64),
        ("row_cut", c_int64),
        ("index", c_void_p),
        ("out", c_void_p),
        ("num_threads", c_int32),
    )


def can_decode() -> bool:
    """Whether the compiled code is available."""
    return library() is not None


def decode(coded: CodedTile) -> None:
    """Fill `out`, [rows, columns]. Raises MemoryError."""
    if _code().decode(ctypes.byref(coded)):
        raise MemoryError(_NO_ROOM)


def multiply(coded: CodedTile, inputs: torch.Tensor) -> None:
    """Fill `out`, [rows, n] float32: the numbers times inputs [n, columns] float32, contiguous. Raises MemoryError."""
    if _code().multiply(ctypes.byref(coded), inputs.data_ptr(), len(inputs)):
        raise MemoryError(_NO_ROOM)


@cache
def _code() -> ctypes.CDLL:
    code = library()
    assert code is not None, "asked before"
    code.decode.restype, code.decode.argtypes = c_int32, (POINTER(CodedTile),)
    code.multiply.restype, code.multiply.argtypes = c_int32, (POINTER(CodedTile), c_void_p, c_int64)
    return code
