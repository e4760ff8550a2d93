"""Lazy, checked access to the tensors of a folder of safetensors files.

E experts, R rows, C columns of a matrix.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import cached_property
from math import prod
from pathlib import Path
from threading import Lock
from typing import Any, Final

import torch

from moeserve.checkpoints.number_formats import FP8, PLAIN, Fp8Blocks, Mxfp4, NumberFormat, Plain
from moeserve.checkpoints.tensor_file import StoredTensor, TensorFile, reject_pointer
from moeserve.config import Dtype
from moeserve.errors import CheckpointError
from moeserve.tensors import dtype_name

_INDEX: Final = "model.safetensors.index.json"
_SINGLE: Final = "model.safetensors"
_PICKLES: Final = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_STORED: Final = {**PLAIN, FP8: torch.float8_e4m3fn, "U8": torch.uint8}
# What is converted goes through a buffer of at most so many numbers, so that a host needs hardly more memory than its weights.
_CHUNK: Final = 2**17


class SafetensorsFolder:
    """Tensors by name, out of one `model.safetensors` or of the shards its index names; only what is asked for is read.

    FP8 tensors with a `_scale_inv` beside them and MXFP4 `_blocks` with their `_scales` read as the numbers they stand for.
    bytes_read: how much of the tensors has been read so far. Any number of threads may read.
    Raises CheckpointError naming the file when something is missing, truncated, changed, not safetensors or not finite.
    """

    def __init__(self, folder: Path, fp8_block: tuple[int, int] = (128, 128)) -> None:
        self.folder = folder
        self.bytes_read = 0
        self._fp8_block = fp8_block
        self._lock = Lock()
        self._files: dict[Path, TensorFile] = {}
        self._file_of = self._index()

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    @cached_property
    def names(self) -> list[str]:
        """Of all tensors, sorted."""
        return sorted(self._file_of)

    def below(self, prefix: str) -> list[str]:
        """Names of the tensors below a module."""
        first, last = (bisect_left(self.names, f"{prefix}{end}") for end in (".", "/"))
        return self.names[first:last]

    def stored_as(self, name: str) -> tuple[str, ...]:
        """The tensors of the folder that a tensor is stored as, its scales among them; none when it is missing. Reads no header."""
        scales = f"{name.removesuffix('_blocks')}_scales" if name.endswith("_blocks") else f"{name}_scale_inv"
        return tuple(part for part in (name, scales) if part in self) if name in self else ()

    def dtype(self, name: str) -> Dtype:
        """Element type of a tensor, from the file's header alone; bfloat16 for those that are stored in blocks with scales."""
        stored = self._stored(name).dtype
        if isinstance(self._format(name, stored), Plain):
            return dtype_name(PLAIN[stored])  # type: ignore[return-value]
        return "bfloat16"

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor as it is stored, from the file's header alone."""
        return self._stored(name).shape

    def read(self, name: str, shape: Sequence[int], dtype: torch.dtype, expert: int | None = None) -> torch.Tensor:
        """The tensor, which must have `shape`, or its `expert`-th slice along the first dimension, cast to `dtype`; finite."""
        out = torch.empty(tuple(shape) if expert is None else tuple(shape[1:]), dtype=dtype)
        self.read_into(out if out.dim() > 1 else out[None], name, shape, expert)
        return out

    def read_into(
        self,
        out: torch.Tensor,
        name: str,
        shape: Sequence[int],
        expert: int | None = None,
        rows: slice | None = None,
        columns: slice | None = None,
    ) -> None:
        """Fill `out` with `rows` and `columns` of a tensor, cast to its type.

        The tensor must have `shape`: [R, C], or [E, R, C], and then `expert` says which matrix; a vector is a matrix of one row.
        `out` [R', ...] takes the numbers in the order they are stored in, one row or several to each of its own rows.
        """
        stored = self._stored(name)
        number_format = self._format(name, stored.dtype)
        self._check_shape(name, stored, shape, number_format)
        height, width = _matrix(shape, expert)
        rows, columns = rows or slice(0, height), columns or slice(0, width)
        if not out.numel():
            return
        with ExitStack() as opened:
            source = _Source(self, opened, expert, is_vector=height == 1)
            if isinstance(number_format, Plain) and out.dtype == PLAIN[stored.dtype] and out.is_contiguous():
                source.fill(name, rows, columns, out.view(rows.stop - rows.start, -1))
                self._must_be_finite(name, out, out.dtype)
            else:
                for part, into in _chunks(out, rows, columns):
                    numbers = number_format.read(source.read, part, columns)
                    self._must_be_finite(name, numbers, out.dtype)
                    into.copy_(numbers.reshape(into.shape))

    def file_of(self, name: str) -> tuple[TensorFile, StoredTensor]:
        """Where a tensor is."""
        return self._file(self._path(name)), self._stored(name)

    def count(self, nbytes: int) -> None:
        """So many bytes more have been read."""
        with self._lock:
            self.bytes_read += nbytes

    def _format(self, name: str, stored: str) -> NumberFormat:
        scales = f"{name}_scale_inv"
        if stored in PLAIN:
            return Plain(name)
        if stored == FP8 and scales in self:
            return Fp8Blocks(name, scales, self._fp8_block)
        if stored == "U8" and name.endswith("_blocks"):
            return Mxfp4(name, f"{name.removesuffix('_blocks')}_scales")
        without = f" without {scales}" if stored == FP8 else ""
        raise CheckpointError(f"{self._path(name)}: tensor {name} is stored as {stored}{without}; supported: {', '.join(PLAIN)}")

    def _check_shape(self, name: str, stored: StoredTensor, shape: Sequence[int], number_format: NumberFormat) -> None:
        for part, expected in number_format.shapes(tuple(shape)).items():
            found = self._stored(part).shape
            if found != expected:
                raise CheckpointError(f"{self._path(part)}: tensor {part} has shape {list(found)}, config.json says {list(expected)}")

    def _must_be_finite(self, name: str, numbers: torch.Tensor, dtype: torch.dtype) -> None:
        # Casting keeps the order, so the extremes tell whether all numbers fit; NaN is both.
        if not all(torch.isfinite(extreme.to(dtype)) for extreme in torch.aminmax(numbers)):
            raise CheckpointError(f"{self._path(name)}: tensor {name} holds NaN or Inf as {dtype_name(dtype)}")

    def _path(self, name: str) -> Path:
        if name not in self._file_of:
            raise CheckpointError(f"{self.folder}: tensor {name} is missing")
        return self.folder / self._file_of[name]

    def _file(self, path: Path) -> TensorFile:
        with self._lock:
            if path not in self._files:
                self._files[path] = TensorFile(path)
            return self._files[path]

    def _stored(self, name: str) -> StoredTensor:
        path = self._path(name)
        tensors = self._file(path).tensors
        if name not in tensors:
            raise CheckpointError(f"{path}: tensor {name} is missing, but {_INDEX} says it is there")
        return tensors[name]

    def _index(self) -> dict[str, str]:
        index, single = self.folder / _INDEX, self.folder / _SINGLE
        if index.is_file():
            files = read_json(index).get("weight_map")
            if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
                raise CheckpointError(f"{index} has no weight_map from tensor names to file names")
            for file in set(files.values()):
                if Path(file).name != file or not file.endswith(".safetensors"):
                    raise CheckpointError(f"{index} names the file {file!r}; allowed: safetensors files in the same folder")
            return files
        if single.is_file():
            return dict.fromkeys(self._file(single).tensors, _SINGLE)
        pickles = sorted(path.name for pattern in _PICKLES for path in self.folder.glob(pattern))
        found = f"; {pickles[0]} is a pickle, which is never loaded: save the model as safetensors" if pickles else ""
        raise CheckpointError(f"{self.folder} has neither {_SINGLE} nor {_INDEX}{found}")


class _Source:
    """Reads of one matrix, and of the scales that belong to it; `expert` as in `SafetensorsFolder.read_into`."""

    def __init__(self, folder: SafetensorsFolder, opened: ExitStack, expert: int | None, is_vector: bool) -> None:
        self._folder = folder
        self._opened = opened
        self._expert = expert
        self._is_vector = is_vector
        self._descriptors: dict[TensorFile, int] = {}

    def read(self, name: str, rows: slice, columns: slice) -> torch.Tensor:
        """[R, C] as stored."""
        _, stored = self._folder.file_of(name)
        out = torch.empty(rows.stop - rows.start, columns.stop - columns.start, dtype=_STORED[stored.dtype])
        self.fill(name, rows, columns, out)
        return out

    def fill(self, name: str, rows: slice, columns: slice, out: torch.Tensor) -> None:
        """Into `out` [R, C], contiguous, of the stored type."""
        file, stored = self._folder.file_of(name)
        if file not in self._descriptors:
            self._descriptors[file] = self._opened.enter_context(file.opened())
        height, width = _matrix(stored.shape, self._expert, self._is_vector)
        size = out.dtype.itemsize
        first = (self._expert or 0) * height + rows.start
        part = slice(columns.start * size, columns.stop * size)
        file.read_rows(self._descriptors[file], stored.offset + first * width * size, width * size, part, out)
        self._folder.count(out.nbytes)


def _matrix(shape: Sequence[int], expert: int | None, is_vector: bool = False) -> tuple[int, int]:
    """Rows and columns of the tensor, or of the slice of one expert."""
    own = list(shape) if expert is None else list(shape[1:])
    return (1, prod(own)) if is_vector or len(own) == 1 else (own[0], prod(own[1:]))


def _chunks(out: torch.Tensor, rows: slice, columns: slice) -> Iterator[tuple[slice, torch.Tensor]]:
    """Stored rows, and the rows of `out` they fill."""
    group = (rows.stop - rows.start) // len(out)
    at_once = max(1, _CHUNK // max(1, group * (columns.stop - columns.start)))
    for start in range(0, len(out), at_once):
        into = out[start : start + at_once]
        yield slice(rows.start + start * group, rows.start + (start + len(into)) * group), into


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError naming the file."""
    try:
        reject_pointer(path)
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return data
