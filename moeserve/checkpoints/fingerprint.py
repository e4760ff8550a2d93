"""Fingerprints of files that weights were read from, so that a later read can tell whether they have changed.

Modification times are left out: copies on other nodes and image layers have their own, and some tools set all of them alike. Instead the
content itself is sampled, in every tensor.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Final, NamedTuple

from moeserve.checkpoints.tensor_file import TensorFile
from moeserve.errors import CheckpointError
from moeserve.loops import in_threads

#: up to this size the whole file is read
_SMALL_BYTES: Final = 16 * 2**20
# Of larger ones a thousandth: weights that were trained on differ in any 2,048 of them.
_STRIDE_BYTES: Final = 4 * 2**20
_BLOCK_BYTES: Final = 4096
# No expert of a stack is without a block, unless it is so small that hardly less than everything would be read.
_SMALL_EXPERT_BYTES: Final = 16 * _BLOCK_BYTES
_DIGEST_BYTES: Final = 16
_READERS: Final = 8

_Span = tuple[int, int]


@dataclass(frozen=True)
class FileMark:
    """One file: its size in bytes, a digest of what describes its content (all of it for JSON), and one of its numbers."""

    path: str
    size: int
    description: bytes
    numbers: bytes


@dataclass(frozen=True)
class Fingerprint:
    """The files of one layer."""

    files: tuple[FileMark, ...]

    def difference(self, now: Fingerprint) -> str | None:
        """What is different `now`, the first of it, in words; None = nothing."""
        before, after = ({file.path: file for file in each.files} for each in (self, now))
        for path, was in before.items():
            if path not in after:
                return f"{path} is not one of its files any more"
            if after[path] != was:
                return _changed(was, after[path])
        return next((f"{path} is a file it did not have" for path in after if path not in before), None)


def _changed(was: FileMark, now: FileMark) -> str:
    if was.size != now.size:
        return f"{was.path} has {now.size:,} bytes and had {was.size:,}"
    if was.description != now.description:
        return f"{was.path} {'describes other tensors' if now.numbers else 'says something else'}"
    return f"the numbers in {was.path} are others"


def fingerprint_of(files: Sequence[Path]) -> Fingerprint:
    """Of files as they are now. Each is read once by a process, and again only when its status says that it has changed.

    Raises CheckpointError naming a file that is missing or broken.
    """
    unknown = [path for path in files if path not in _known or _known[path][0] != _version(path)]
    if unknown:
        _known.update(zip(unknown, in_threads(_marked, unknown, _READERS), strict=True))
    return Fingerprint(tuple(_known[path][1] for path in files))


_Version = tuple[int, ...]
_known: Final[dict[Path, tuple[_Version, FileMark]]] = {}


def _version(path: Path) -> _Version:
    """Different after every change of a file on this machine, even one that sets back its modification time."""
    try:
        status = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _marked(path: Path) -> tuple[_Version, FileMark]:
    version = _version(path)
    try:
        content = _CONTENT.get(path.suffix, _text)(path)
        mark = FileMark(str(path), version[2], _digest(content.description), _numbers(path, version[2], content))
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if _version(path) != version:
        raise CheckpointError(f"{path} changed while it was read; load it again when no process writes to it")
    return version, mark


class _Content(NamedTuple):
    """What describes the content of a file, where its tensors begin and end, and checksums of them that it has of its own."""

    description: bytes
    spans: Sequence[_Span] = ()
    checksums: bytes = b""


def _text(path: Path) -> _Content:
    return _Content(path.read_bytes())


def _safetensors(path: Path) -> _Content:
    tensors = sorted(TensorFile(path).tensors.values(), key=lambda tensor: (tensor.offset, prod(tensor.shape)))
    with path.open("rb") as file:
        header = file.read(tensors[0].offset if tensors else -1)
    spans = pairwise([*(tensor.offset for tensor in tensors), path.stat().st_size])
    return _Content(header, [each for tensor, span in zip(tensors, spans, strict=True) for each in _of_experts(tensor.shape, *span)])


def _of_experts(shape: Sequence[int], start: int, end: int) -> Iterable[_Span]:
    """Of a stack of experts so small that some would be between two blocks, each of them; else all of the tensor."""
    size = (end - start) // max(1, shape[0]) if len(shape) > 2 else 0
    return pairwise(range(start, end + 1, size)) if _SMALL_EXPERT_BYTES <= size < _STRIDE_BYTES else [(start, end)]


def _torch(path: Path) -> _Content:
    with zipfile.ZipFile(path) as archive:
        entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    directory = repr([(entry.filename, entry.file_size) for entry in entries]).encode()
    size = path.stat().st_size
    spans = list(pairwise([*(min(entry.header_offset, size) for entry in entries), size]))
    return _Content(directory, spans, repr([entry.CRC for entry in entries]).encode())


#: by suffix
_CONTENT: Final[Mapping[str, Callable[[Path], _Content]]] = {".safetensors": _safetensors, ".pt": _torch}


def _digest(content: bytes) -> bytes:
    return blake2b(content, digest_size=_DIGEST_BYTES).digest()


def _numbers(path: Path, size: int, content: _Content) -> bytes:
    if not content.spans:
        return b""
    digest = blake2b(content.checksums, digest_size=_DIGEST_BYTES)
    with path.open("rb", buffering=0) as file:
        if size <= _SMALL_BYTES:
            file.seek(content.spans[0][0])
            digest.update(file.read())
            return digest.digest()
        # Or every block would bring its neighbors along.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        for start, length in _blocks(content.spans):
            digest.update(os.pread(file.fileno(), length, start))
    return digest.digest()


def _blocks(spans: Sequence[_Span]) -> Iterator[_Span]:
    """Start and length of a block in the middle of every piece of every span."""
    for start, end in spans:
        for first in range(start, end, _STRIDE_BYTES):
            piece = min(_STRIDE_BYTES, end - first)
            length = min(_BLOCK_BYTES, piece)
            yield first + (piece - length) // 2, length
