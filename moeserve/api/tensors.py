"""Tensors <-> raw little-endian bytes, and the one table of dtypes that may cross a process boundary."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from ctypes import string_at
from math import isfinite, prod

import torch

from moeserve.errors import InvalidRequest
from moeserve.kernels import all_finite

assert sys.byteorder == "little", "moeserve sends raw little-endian tensors and runs on little-endian machines only"

# A received tensor is a read-only view of the message; nothing here writes to it, so torch's warning says nothing new.
warnings.filterwarnings("ignore", message="The given buffer is not writable", category=UserWarning)

#: name in configuration -> torch dtype, for activations and weights
FLOAT_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

#: number of the protobuf enum `moeserve.v1.DType` -> torch dtype
WIRE_DTYPES = {
    1: torch.float32,
    2: torch.float16,
    3: torch.bfloat16,
    4: torch.int64,
    5: torch.int32,
    6: torch.bool,
}
WIRE_NUMBERS = {dtype: number for number, dtype in WIRE_DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.bfloat16` -> "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def require_data(tensor: torch.Tensor, name: str) -> None:
    """Raises InvalidRequest unless it is dense, and its numbers are there: not so of wrappers (DTensor), nor of what FSDP has freed."""
    if not _has_data(tensor):
        kind = f"{str(tensor.layout).removeprefix('torch.')} {type(tensor).__name__}".replace(" Tensor", " tensor")
        raise InvalidRequest(f"{name} is a {kind} on {tensor.device}; allowed: dense tensors that have data", name)


def _has_data(tensor: torch.Tensor) -> bool:
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_meta:
        return False
    if not tensor.is_cpu:
        return type(tensor).__torch_dispatch__ is torch.Tensor.__torch_dispatch__
    try:
        # What FSDP frees are parts of one tensor: without memory, the address of a part is its offset.
        return tensor.numel() == 0 or tensor.data_ptr() != tensor.storage_offset() * tensor.itemsize
    except RuntimeError:  # of torch.func
        return False


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no element is NaN or Inf: one pass, and no mask of the size of the tensor."""
    known = all_finite(tensor)
    if known is not None:
        return known
    # The extremes are NaN if any element is.
    return not tensor.numel() or all(isfinite(extreme.item()) for extreme in torch.aminmax(tensor))


def without_unused(tensor: torch.Tensor, used_token: torch.Tensor | None, fill: int = 0) -> torch.Tensor:
    """`tensor` [T, ...], or a copy of it that holds `fill` in the rows of unused tokens where there are any; used_token [T] bool."""
    if used_token is None:
        return tensor
    unused = (~used_token).nonzero().squeeze(1)
    return tensor.index_fill(0, unused, fill) if len(unused) else tensor


def nbytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes of a dense tensor."""
    return prod(shape) * dtype.itemsize


def view(data: bytes | bytearray | memoryview, shape: Sequence[int], dtype: torch.dtype, what: str = "tensor") -> torch.Tensor:
    """A tensor over `data` without a copy; it must not be written to unless `data` is writable.

    Raises InvalidRequest when the shape is not one of non-negative sizes or does not match the number of bytes.
    """
    # A shape with a zero in it takes no bytes, but torch still has to count its elements without that zero.
    is_countable = prod(max(size, 1) for size in shape) < 2**60
    if any(size < 0 for size in shape) or not is_countable or nbytes(shape, dtype) != len(data):
        raise InvalidRequest(
            f"{what} has {len(data)} bytes, but shape {list(shape)} of {dtype_name(dtype)} does not take exactly that many",
            field=what,
        )
    if not len(data):
        return torch.empty(list(shape), dtype=dtype)
    flat = torch.frombuffer(data, dtype=dtype)
    return flat if len(shape) == 1 else flat.view(list(shape))


def small_copy(tensor: torch.Tensor) -> bytes:
    """A copy of the bytes of `tensor`."""
    if not (tensor.is_cpu and tensor.is_contiguous()) or tensor.is_neg():
        return raw(tensor).tobytes()
    return string_at(tensor.data_ptr(), tensor.nbytes) if tensor.numel() else b""


def raw(tensor: torch.Tensor) -> memoryview:
    """The bytes of `tensor` without a copy when it is contiguous and on the CPU, and says nothing else than its memory."""
    dense = tensor.contiguous().resolve_neg()
    # numpy has no bfloat16.
    array = (dense.view(torch.int16) if dense.dtype is torch.bfloat16 else dense).numpy(force=True)
    return array.data.cast("B") if array.size else memoryview(b"")
