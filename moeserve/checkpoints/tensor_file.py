"""One safetensors file.

R rows, C columns of the matrix that the last two dimensions of a tensor are.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError, safe_open

from moeserve.checkpoints.positioned_file import PositionedFile
from moeserve.errors import CheckpointError

_POINTER: Final = b"version https://git-lfs."


@dataclass(frozen=True)
class StoredTensor:
    """One entry of the header: dtype as safetensors calls it ("BF16"), shape, and where in the file its bytes begin."""

    dtype: str
    shape: tuple[int, ...]
    offset: int


class TensorFile(PositionedFile):
    """The header, checked by the safetensors library, and positioned reads of what it describes, from any number of threads.

    Raises CheckpointError naming the file when it is no complete safetensors file, or is not the one whose header was read any more.
    """

    def __init__(self, path: Path) -> None:
        try:
            super().__init__(path)
            with path.open("rb") as file:
                reject_pointer(path, file.read(len(_POINTER)))
            # The library sees to it that sizes, offsets and the length of the file agree; it does not tell offsets.
            with safe_open(path, framework="pt"):
                self.tensors = _header(path)
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing, but model.safetensors.index.json names it") from None
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{path} is not a complete safetensors file: {error}") from None

    def read_rows(self, descriptor: int, offset: int, row_bytes: int, columns: slice, into: torch.Tensor) -> None:
        """Fill `into`, contiguous [R, C], with bytes `columns` of R rows of `row_bytes`, the first of which begins at `offset`."""
        # Through NumPy, which has no bfloat16 but knows bytes; an empty shard has nothing to read.
        if not into.numel():
            return
        buffer = into.view(torch.uint8).numpy().data.cast("B")
        width = columns.stop - columns.start
        if width == row_bytes:
            self.fill(descriptor, buffer, offset)
            return
        for row in range(into.shape[0]):
            self.fill(descriptor, buffer[row * width : (row + 1) * width], offset + row * row_bytes + columns.start)


def reject_pointer(path: Path, content: bytes) -> None:
    """Raises CheckpointError for the few lines of text that Git leaves in a file's place when Git LFS has not fetched it."""
    if content.startswith(_POINTER):
        raise CheckpointError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in {path.parent}")


def _header(path: Path) -> dict[str, StoredTensor]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length))
    return {
        name: StoredTensor(entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in entries.items()
        if name != "__metadata__"
    }
