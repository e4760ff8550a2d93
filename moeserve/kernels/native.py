"""The compiled grouped pass (csrc/*.c), where it was built and this processor can run it; no torch operators in between."""

from __future__ import annotations

import ctypes
import logging
import os
from ctypes import POINTER, Structure, c_char_p, c_float, c_int32, c_int64, c_void_p
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Final

log = logging.getLogger(__name__)

#: from the widest to the one that runs everywhere
KERNELS: Final = ("amx", "avx512_bf16", "avx512", "avx2", "generic")

#: of OpenMP
_RUNTIMES: Final = (b"/libgomp", b"/libomp", b"/libiomp")

#: as in csrc/pass.c
INTERFACE_VERSION: Final = 3


class Bank(Structure):
    """struct bank of csrc/pass.h."""

    _fields_ = (
        ("kernel", c_void_p),
        ("type", c_int32),
        ("rows_type", c_int32),
        ("is_gated", c_int32),
        ("function", c_int32),
        ("limit", c_float),
        ("hidden_size", c_int64),
        ("intermediate_size", POINTER(c_int64)),
        ("up", POINTER(c_void_p)),
        ("down", POINTER(c_void_p)),
        ("up_scale", POINTER(c_void_p)),
        ("down_scale", POINTER(c_void_p)),
        ("up_bias", POINTER(c_void_p)),
        ("down_bias", POINTER(c_void_p)),
    )


class PassPairs(Structure):
    """struct pairs of csrc/pairs.c."""

    _fields_ = (
        ("num_pairs", c_int64),
        ("num_rows", c_int64),
        ("num_experts", c_int64),
        ("hidden_states", c_void_p),
        ("row_index", c_void_p),
        ("local_experts", c_void_p),
        ("weights", c_void_p),
        ("out", c_void_p),
        ("num_threads", c_int32),
    )


class PassWork(Structure):
    """struct work of csrc/pass.h."""

    _fields_ = (
        ("num_pairs", c_int64),
        ("num_rows", c_int64),
        ("hidden_states", c_void_p),
        ("row_index", c_void_p),
        ("tokens_per_expert", c_void_p),
        ("num_experts", c_int64),
        ("input_weights", c_void_p),
        ("weights", c_void_p),
        ("out", c_void_p),
        ("scratch", c_void_p),
        ("num_threads", c_int32),
        ("adds", c_int32),
    )


@cache
def library() -> ctypes.CDLL | None:
    """The compiled code; None, with one log line, if it could not be built or loaded."""
    spec = find_spec("moeserve.kernels._native")
    if spec is None or spec.origin is None:
        log.warning(
            "the compiled kernels are missing (no C compiler when moeserve was installed?): experts run on torch's operators, slower"
        )
        return None
    try:
        _share_openmp()
        loaded = ctypes.CDLL(spec.origin)
    except OSError as error:
        log.warning("the compiled kernels cannot be loaded: %s; experts run on torch, slower", error)
        return None
    if not _is_ours(loaded):
        log.warning(
            "the compiled kernels in %s are of another version of moeserve: install it again; experts run on torch's operators, slower",
            spec.origin,
        )
        return None
    _declare(loaded)
    return loaded


def _declare(loaded: ctypes.CDLL) -> None:
    loaded.find_kernel.restype, loaded.find_kernel.argtypes = c_void_p, (c_char_p, c_int32)
    loaded.scratch_bytes.restype, loaded.scratch_bytes.argtypes = c_int64, (POINTER(Bank), POINTER(PassWork))
    loaded.linear_scratch_bytes.restype, loaded.linear_scratch_bytes.argtypes = c_int64, (c_int64, c_int32)
    loaded.run_linear.restype = None
    loaded.run_linear.argtypes = (c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_int32)
    loaded.run_pass.restype, loaded.run_pass.argtypes = c_int32, (POINTER(Bank), POINTER(PassWork))
    loaded.select_top_k.restype, loaded.select_top_k.argtypes = None, (c_int64, c_int64, c_int64, c_void_p, c_void_p, c_void_p)
    loaded.dispatch_pairs.restype, loaded.dispatch_pairs.argtypes = None, (c_void_p,)
    loaded.write_message.restype, loaded.write_message.argtypes = None, (c_void_p,)
    loaded.pairs_of.restype, loaded.pairs_of.argtypes = c_int64, (c_void_p,)
    loaded.normalize.restype, loaded.normalize.argtypes = None, (c_void_p, c_int64, c_int64, c_float, c_void_p)
    loaded.route_top_k.restype, loaded.route_top_k.argtypes = c_int32, (c_void_p,)
    loaded.all_finite.restype, loaded.all_finite.argtypes = c_int32, (c_void_p, c_int64, c_int32)
    loaded.add_answers.restype, loaded.add_answers.argtypes = None, (c_void_p, c_int64, c_int64, c_int64, c_void_p)
    loaded.run_pairs.restype, loaded.run_pairs.argtypes = c_int32, (POINTER(Bank), POINTER(PassPairs))


def find_kernel(name: str, type_number: int) -> int | None:
    """Its address, None where it does not exist or this processor cannot run it."""
    code = library()
    return None if code is None else code.find_kernel(name.encode(), type_number)


def _is_ours(loaded: ctypes.CDLL) -> bool:
    """Whether it was compiled for this version of the structs above: it would read others in silence, and compute something else."""
    return hasattr(loaded, "interface_version") and loaded.interface_version() == INTERFACE_VERSION


def _share_openmp() -> None:
    """Lets the compiled code find torch's OpenMP, so that both use the same threads instead of waking two sets of them."""
    import torch  # noqa: F401, PLC0415  (loads its runtime)

    # In bytes: names of files that other code has mapped need not be text.
    maps = Path("/proc/self/maps").read_bytes().split(b"\n")
    runtimes = {os.fsdecode(line.split(maxsplit=5)[-1]) for line in maps if any(name in line for name in _RUNTIMES)}
    ctypes.CDLL(min(runtimes) if runtimes else "libgomp.so.1", mode=ctypes.RTLD_GLOBAL)
