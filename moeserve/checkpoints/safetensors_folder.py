"""Lazy, checked access to the tensors of a folder of safetensors files.

E experts, R rows, C columns of a matrix.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Final

import torch

from moeserve.api.tensors import dtype_name
from moeserve.checkpoints.formats import AS_IS, FLOATS, Coded, CodedFormat, NumberFormat, Piece, Plain, Scheme, telltales
from moeserve.checkpoints.json_file import read_json
from moeserve.checkpoints.quantization_config import BESIDE
from moeserve.checkpoints.tensor_file import StoredTensor, TensorFile
from moeserve.config import Dtype
from moeserve.errors import CheckpointError

INDEX: Final = "model.safetensors.index.json"
_SINGLE: Final = "model.safetensors"
_PICKLES: Final = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
#: what safetensors calls the types that formats know -> what torch calls them
_TYPES: Final = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I32": torch.int32,
}
# What is converted goes through a buffer of at most so many numbers, so that a host needs hardly more memory than its weights.
_CHUNK: Final = 2**17
# Of a weight that stands the other way round in the file, a row more costs hardly more reads.
_CHUNK_TURNED: Final = 2**20


class SafetensorsFolder:
    """Tensors by name, out of one `model.safetensors` or of the shards its index names; only what is asked for is read.

    A weight in few bits is asked for by the name it would have as it is (`up_proj.weight`), and read as the numbers it stands for; which
    tensors it is stored as, `scheme` says.
    bytes_read: how much of the tensors has been read so far. Any number of threads may read.
    Raises CheckpointError naming the file when something is missing, truncated, changed, not safetensors or not finite.
    """

    def __init__(self, folder: Path, scheme: Scheme = AS_IS) -> None:
        self.folder = folder
        self.bytes_read = 0
        self.scheme = scheme
        self._lock = Lock()
        self._files: dict[Path, TensorFile] = {}
        self._file_of = self._index()

    def __contains__(self, name: str) -> bool:
        """Whether the index has a tensor, or a weight in whatever format."""
        return name in self._file_of or any(told in self._file_of for told in telltales(name))

    def format_of(self, name: str) -> NumberFormat:
        """How a weight is stored, and that all of it is there; the names in the index and config.json are enough to tell."""
        try:
            found = self.scheme.format_of(name, self._file_of)
        except ValueError as error:
            raise CheckpointError(f"{self.folder}: {error}") from None
        if found is None:
            raise CheckpointError(f"{self.folder}: tensor {name} is missing")
        return found

    @cached_property
    def names(self) -> list[str]:
        """Of all tensors, sorted."""
        return sorted(self._file_of)

    def below(self, prefix: str) -> list[str]:
        """Names of the tensors below a module."""
        first, last = (bisect_left(self.names, f"{prefix}{end}") for end in (".", "/"))
        return self.names[first:last]

    def files_below(self, prefix: str) -> list[Path]:
        """Files that describe the folder, and those that hold the tensors below a module."""
        described = (self.folder / name for name in ("config.json", *BESIDE, INDEX))
        return [*filter(Path.is_file, described), *sorted({self._path(name) for name in self.below(prefix)})]

    def stored_as(self, name: str) -> tuple[str, ...]:
        """The tensors that a tensor is stored as and those about it that do not matter; none when it is missing. Reads no header."""
        if name not in self:
            return ()
        number_format = self.format_of(name)
        return (*number_format.names, *(known for known in number_format.known if known in self._file_of))

    def dtype(self, name: str) -> Dtype:
        """Element type of a tensor, from the file's header alone; bfloat16 for weights in few bits."""
        if not isinstance(self.format_of(name), Plain):
            return "bfloat16"
        if not self._path(name).exists():
            raise CheckpointError(
                f"{self._path(name)} is not there yet, and config.json names no dtype: set model.dtype to plan before it is"
            )
        return dtype_name(self._plain_type(name))  # type: ignore[return-value]

    def is_here(self, name: str) -> bool:
        """Whether a tensor's file is there already."""
        return self._path(name).exists()

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor as it is stored, from the file's header alone."""
        return self._stored(name).shape

    def read(self, name: str, shape: Sequence[int], dtype: torch.dtype, expert: int | None = None) -> torch.Tensor:
        """The tensor, which must have `shape`, or its `expert`-th slice along the first dimension, cast to `dtype`; finite."""
        self.checked(name, shape, expert)
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
        number_format, pieces = self.checked(name, shape, expert)
        height, width = pieces[name].matrix if isinstance(number_format, Plain) else (shape[-2], shape[-1])
        rows, columns = rows or slice(0, height), columns or slice(0, width)
        if not out.numel():
            return
        with ExitStack() as opened:
            source = _Source(self, opened, pieces, expert or 0)
            if isinstance(number_format, Plain) and out.dtype == self._plain_type(name) and out.is_contiguous():
                source.fill(name, rows, columns, out.view(rows.stop - rows.start, -1))
                self._must_be_finite(number_format, out, out.dtype)
            else:
                for part, into in _chunks(out, rows, columns, _CHUNK_TURNED if number_format.is_turned else _CHUNK):
                    numbers = source.numbers(number_format, part, columns)
                    self._must_be_finite(number_format, numbers, out.dtype)
                    into.copy_(numbers.reshape(into.shape))

    def read_coded(self, name: str, shape: Sequence[int], expert: int | None, rows: slice, columns: slice) -> Coded:
        """That part of a weight in few bits as it is stored. Its numbers may not be finite."""
        number_format, pieces = self.checked(name, shape, expert)
        assert isinstance(number_format, CodedFormat), f"{name} is stored as it is"
        with ExitStack() as opened:
            return _Source(self, opened, pieces, expert or 0).coded(number_format, rows, columns)

    def scale_type(self, number_format: CodedFormat) -> torch.dtype:
        """Of its scales, from the file's header; while there is no file, the usual one."""
        name = number_format.names[1]
        stored = self._stored(name).dtype if self._path(name).is_file() else number_format.scale_types[0]
        # In a byte there are exponents.
        return torch.float8_e8m0fnu if stored == "U8" else _TYPES[stored]

    def file_of(self, name: str) -> tuple[TensorFile, StoredTensor]:
        """Where a tensor is."""
        return self._file(self._path(name)), self._stored(name)

    def count(self, nbytes: int) -> None:
        """So many bytes more have been read."""
        with self._lock:
            self.bytes_read += nbytes

    def _plain_type(self, name: str) -> torch.dtype:
        self._check_type(name, FLOATS)
        return _TYPES[self._stored(name).dtype]

    def checked(self, name: str, shape: Sequence[int], expert: int | None) -> tuple[NumberFormat, Mapping[str, Piece]]:
        """The format of a weight and what it is stored as; types and shapes are right, by the file's header."""
        number_format = self.format_of(name)
        stack, own = (shape[:1], shape[1:]) if expert is not None else ((), shape)
        try:
            pieces = number_format.pieces(tuple(own))
        except ValueError as error:
            raise CheckpointError(f"{self._path(number_format.names[0])}: {name} {error}") from None
        for part, piece in pieces.items():
            self._check_type(part, piece.types)
            found = self._stored(part).shape
            if not piece.fits(found, tuple(stack)):
                expected = [*stack, *piece.shape]
                raise CheckpointError(f"{self._path(part)}: tensor {part} has shape {list(found)}, config.json says {expected}")
        return number_format, pieces

    def _check_type(self, name: str, types: Sequence[str]) -> None:
        stored = self._stored(name).dtype
        if stored not in types:
            raise CheckpointError(f"{self._path(name)}: tensor {name} is stored as {stored}; supported: {', '.join(types)}")

    def _must_be_finite(self, number_format: NumberFormat, numbers: torch.Tensor, dtype: torch.dtype) -> None:
        # Casting keeps the order, so the extremes tell whether all numbers fit; NaN is both.
        if not all(torch.isfinite(extreme.to(dtype)) for extreme in torch.aminmax(numbers)):
            name = number_format.names[0]
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
            raise CheckpointError(f"{path}: tensor {name} is missing, but {INDEX} says it is there")
        return tensors[name]

    def _index(self) -> dict[str, str]:
        index, single = self.folder / INDEX, self.folder / _SINGLE
        if index.is_file():
            files = read_json(index).get("weight_map")
            if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
                raise CheckpointError(f"{index} has no weight_map from tensor names to file names")
            for file in set(files.values()):
                if Path(file).name != file or not file.endswith(".safetensors") or not file.isprintable():
                    raise CheckpointError(f"{index} names the file {file!r}; allowed: safetensors files in the same folder")
            return files
        if single.is_file():
            return dict.fromkeys(self._file(single).tensors, _SINGLE)
        pickles = sorted(path.name for pattern in _PICKLES for path in self.folder.glob(pattern))
        found = f"; {pickles[0]} is a pickle, which is never loaded: save the model as safetensors" if pickles else ""
        raise CheckpointError(f"{self.folder} has neither {_SINGLE} nor {INDEX}{found}")


class _Source:
    """Reads of the pieces of one matrix, the one of `expert` in stacks."""

    def __init__(self, folder: SafetensorsFolder, opened: ExitStack, pieces: Mapping[str, Piece], expert: int) -> None:
        self._folder = folder
        self._opened = opened
        self._pieces = pieces
        self._expert = expert
        self._descriptors: dict[TensorFile, int] = {}

    def numbers(self, number_format: NumberFormat, rows: slice, columns: slice) -> torch.Tensor:
        """[R, C] decoded. Raises CheckpointError for what no file in this format says."""
        try:
            return number_format.read(self.read, rows, columns)
        except ValueError as error:
            raise CheckpointError(f"{self._folder.folder}: {error}") from None

    def coded(self, number_format: CodedFormat, rows: slice, columns: slice) -> Coded:
        """The same, not decoded."""
        try:
            return number_format.coded(self.read, rows, columns)
        except ValueError as error:
            raise CheckpointError(f"{self._folder.folder}: {error}") from None

    def read(self, name: str, rows: slice, columns: slice) -> torch.Tensor:
        """[R, C] as stored."""
        file, stored = self._folder.file_of(name)
        for part, size, what in zip((rows, columns), self._pieces[name].matrix, ("rows", "columns"), strict=True):
            if part.stop > size:
                named = f"but what tells groups of the weight names {part.stop - 1}"
                raise CheckpointError(f"{file.path}: tensor {name} has {size} {what}, {named}")
        out = torch.empty(rows.stop - rows.start, columns.stop - columns.start, dtype=_TYPES[stored.dtype])
        self.fill(name, rows, columns, out)
        return out

    def fill(self, name: str, rows: slice, columns: slice, out: torch.Tensor) -> None:
        """Into `out` [R, C], contiguous, of the stored type."""
        file, stored = self._folder.file_of(name)
        if file not in self._descriptors:
            self._descriptors[file] = self._opened.enter_context(file.opened())
        height, width = self._pieces[name].matrix
        size = out.dtype.itemsize
        first = self._expert * height + rows.start
        part = slice(columns.start * size, columns.stop * size)
        file.read_rows(self._descriptors[file], stored.offset + first * width * size, width * size, part, out)
        self._folder.count(out.nbytes)


def _chunks(out: torch.Tensor, rows: slice, columns: slice, numbers: int) -> Iterator[tuple[slice, torch.Tensor]]:
    """Stored rows, and the rows of `out` they fill."""
    group = (rows.stop - rows.start) // len(out)
    at_once = max(1, numbers // max(1, group * (columns.stop - columns.start)))
    for start in range(0, len(out), at_once):
        into = out[start : start + at_once]
        yield slice(rows.start + start * group, rows.start + (start + len(into)) * group), into
