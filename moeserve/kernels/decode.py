"""Tiles of weights in few bits, decoded by the compiled code (native/decode.c)."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_int32, c_int64, c_void_p

from moeserve.kernels.native import library


class Coded(Structure):
    """struct coded of native/decode.c."""

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
    """Whether the compiled code is there."""
    return library() is not None


def decode(coded: Coded) -> None:
    """Fill `out`. Raises MemoryError."""
    code = library()
    assert code is not None, "asked before"
    code.decode.restype, code.decode.argtypes = c_int32, (POINTER(Coded),)
    if code.decode(ctypes.byref(coded)):
        raise MemoryError("there is no room for the scales of a row of weights")
