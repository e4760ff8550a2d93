"""One file of `torch.save`, read without torch's unpickler: a zip of `data.pkl`, and of the storages of its tensors, `data/0`, `data/1`, ….

Checked against torch 2.13, which reads the same tensors; files of torch before 1.6 are no zip and are refused.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moeserve.checkpoints.inert_pickle import External, Made, Named, read_pickle
from moeserve.checkpoints.positioned_file import PositionedFile
from moeserve.errors import CheckpointError

_DTYPES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
#: "little" or "big"; what is compressed may claim to be anything
_MAX_ORDER_BYTES = 16
_MAX_DIMENSIONS = 64
_TENSOR = "torch._utils._rebuild_tensor_v2"
_PARAMETER = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
_WITH_ATTRIBUTES = "torch._tensor._rebuild_from_type_v2"
_TENSOR_CLASSES = ("torch.Tensor", "torch.nn.parameter.Parameter")


class _Place(NamedTuple):
    """Where a tensor is: so many numbers from byte `start` of the file on, and how they are laid out."""

    start: int
    length: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]


class TorchFile(PositionedFile):
    """Names and tensors of the file; a tensor is read when asked for. Raises CheckpointError naming the file when it is broken.

    What is no tensor is never made, and harms only who asks for it. `path`: the file.
    """

    def __init__(self, path: Path) -> None:
        try:
            super().__init__(path)
            with zipfile.ZipFile(path) as archive:
                self._entries = {entry.filename: entry for entry in archive.infolist()}
                name = next((name for name in self._entries if name.count("/") == 1 and name.endswith("/data.pkl")), "data.pkl")
                self._root = name.removesuffix("data.pkl")
                if self._entries[name].compress_type != zipfile.ZIP_STORED:
                    raise ValueError("its pickle is compressed")
                order = self._entries.get(f"{self._root}byteorder")
                if order is not None and (order.file_size > _MAX_ORDER_BYTES or archive.read(order) != b"little"):
                    raise ValueError("its numbers are big-endian")
                content = read_pickle(archive.read(name))
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing") from None
        except Exception as error:
            # Whatever a hostile or broken file makes the libraries stumble over, it is the file that is wrong.
            raise CheckpointError(f"{path} is not a file of tensors: {_sentence(error)}") from None
        items = items_of(content)
        if items is None:
            raise CheckpointError(f"{path} holds {described(content)}; expected names and tensors")
        self.items = {name if isinstance(name, str) else described(name): value for name, value in items.items()}

    def tensor(self, name: str, value: Any, *, is_read: bool = True) -> torch.Tensor:
        """The tensor that `value`, found in `items` under `name`, describes; on the device "meta" unless `is_read`.

        Raises CheckpointError when it is none, or not a plain one.
        """
        value = _bare(value)
        if not isinstance(value, Made) or value.path != _TENSOR:
            raise CheckpointError(f"{self.path}: {name} is {described(value)}; expected a dense tensor, and nothing was run")
        try:
            storage, offset, size, stride, _, _, *more = value.arguments
            if any(more):
                raise ValueError("its numbers are to be conjugated or negated")
            place = self._place(storage, offset, tuple(size), tuple(stride))
            return self._read(place) if is_read else torch.empty_strided(place.size, place.stride, dtype=place.dtype, device="meta")
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(f"{self.path}: tensor {name} is not in the file as it is described: {_sentence(error)}") from None

    def _place(self, storage: External, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> _Place:
        kind, storage_type, key, _, count = storage.key
        if kind != "storage" or storage_type.path not in _DTYPES:
            raise ValueError(f"stored as {storage_type.path}; supported: {', '.join(_DTYPES)}")
        if not isinstance(key, str) or len(size) > _MAX_DIMENSIONS or max((offset, *size, *stride)) >= 2**63:
            raise ValueError("in a storage, or of a size, that no tensor has")
        dtype = _DTYPES[storage_type.path]
        last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
        if min((offset, *size, *stride)) < 0 or prod(size) > count or (prod(size) and last >= count):
            raise ValueError(f"{list(size)} numbers from {offset} to {last}, of a storage of {count}")
        start = self._start(f"{self._root}data/{key}", count * dtype.itemsize)
        return _Place(start + offset * dtype.itemsize, last - offset + 1 if prod(size) else 0, dtype, size, stride)

    def _start(self, name: str, nbytes: int) -> int:
        """Where the bytes of an entry begin: behind a header of 30 bytes, its name, and padding that only this header tells."""
        entry, header = self._entries[name], bytearray(30)
        if entry.compress_type != zipfile.ZIP_STORED or not 0 <= nbytes <= entry.file_size:
            raise ValueError(f"{name} has {entry.file_size} bytes of {nbytes}, or is compressed")
        with self.opened() as descriptor:
            self.fill(descriptor, memoryview(header), entry.header_offset)
            start = entry.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
            if start + nbytes > os.fstat(descriptor).st_size:
                raise ValueError(f"{name} lies beyond the end of the file")
        return start

    def _read(self, place: _Place) -> torch.Tensor:
        numbers = torch.empty(place.length, dtype=place.dtype)
        if place.length:
            with self.opened() as descriptor:
                self.fill(descriptor, numbers.view(torch.uint8).numpy().data.cast("B"), place.start)
        return numbers.as_strided(place.size, place.stride)


def items_of(value: Any) -> Mapping[Any, Any] | None:
    """The entries of a dict, or of an object that is one, as OrderedDict is; None of anything else."""
    if isinstance(value, Made):
        return value.items if value.items or value.path == "collections.OrderedDict" else None
    return value if isinstance(value, dict) else None


def described(value: Any) -> str:
    """What a value of a pickle is, in words."""
    if isinstance(value, Named | Made):
        path = value.path if value.path.isprintable() else repr(value.path)
        return f"the name {path}" if isinstance(value, Named) else f"an object made by {path}"
    return f"a {type(value).__name__}"


def _sentence(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def _is_class_of_tensors(value: Any) -> bool:
    return isinstance(value, Named) and value.path in _TENSOR_CLASSES


def _bare(value: Any) -> Any:
    """A tensor without what torch wraps around one that is a parameter, or has attributes."""
    while isinstance(value, Made) and len(value.arguments) >= 3:
        if value.path in _PARAMETER:
            value = value.arguments[0]
        elif value.path == _WITH_ATTRIBUTES and _is_class_of_tensors(value.arguments[1]) and isinstance(value.arguments[2], tuple):
            # What is in a tuple was made before it: this comes to an end.
            value = Made(value.arguments[0], value.arguments[2])
        else:
            break
    return value
