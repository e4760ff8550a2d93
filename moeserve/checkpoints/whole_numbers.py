"""Tensors of whole numbers: tables, not weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

from moeserve.checkpoints.safetensors_folder import SafetensorsFolder
from moeserve.errors import CheckpointError

#: as safetensors calls them
_TYPES: Final = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}


def read_whole_numbers(files: SafetensorsFolder, name: str, shape: Sequence[int]) -> torch.Tensor:
    """The tensor as int64. Raises CheckpointError naming the file when it has another shape, or fractions."""
    file, stored = files.file_of(name)
    if list(stored.shape) != list(shape):
        raise CheckpointError(f"{file.path}: tensor {name} has shape {list(stored.shape)}, config.json says {list(shape)}")
    if stored.dtype not in _TYPES:
        raise CheckpointError(f"{file.path}: tensor {name} is stored as {stored.dtype}; allowed: whole numbers ({', '.join(_TYPES)})")
    numbers = torch.empty(tuple(shape), dtype=_TYPES[stored.dtype])
    if numbers.numel():
        with file.opened() as descriptor:
            file.fill(descriptor, numbers.view(torch.uint8).numpy().data.cast("B"), stored.offset)
    files.count(numbers.nbytes)
    return numbers.long()
