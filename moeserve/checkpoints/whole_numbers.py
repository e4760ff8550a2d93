"""Tensors of whole numbers: tables, not weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from safetensors import safe_open

from moeserve.api.tensors import dtype_name
from moeserve.checkpoints.safetensors_folder import SafetensorsFolder
from moeserve.errors import CheckpointError


def read_whole_numbers(files: SafetensorsFolder, name: str, shape: Sequence[int]) -> torch.Tensor:
    """The tensor as int64. Raises CheckpointError naming the file when it has another shape, or fractions."""
    path = files.file_of(name)[0].path
    with safe_open(path, "pt") as opened:
        numbers: torch.Tensor = opened.get_tensor(name)
    if list(numbers.shape) != list(shape):
        raise CheckpointError(f"{path}: tensor {name} has shape {list(numbers.shape)}, config.json says {list(shape)}")
    if numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool:
        raise CheckpointError(f"{path}: tensor {name} is {dtype_name(numbers.dtype)}; allowed: whole numbers")
    return numbers.long()
