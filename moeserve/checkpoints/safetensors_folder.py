"""Lazy, checked access to the tensors of a folder of safetensors files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from moeserve.config import Dtype
from moeserve.errors import CheckpointError
from moeserve.tensors import dtype_name

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_DTYPES: dict[str, Dtype] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class SafetensorsFolder:
    """Tensors by name, out of one `model.safetensors` or of the shards its index names; a tensor is read when asked for.

    Raises CheckpointError naming the file when something is missing, truncated or not safetensors.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file_of = self._index()
        self._open: dict[Path, Any] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def dtype(self, name: str) -> Dtype:
        """Element type of a tensor, from the file's header alone."""
        stored = self._stored(name).get_dtype()
        if stored not in _DTYPES:
            raise CheckpointError(f"{self._path(name)}: tensor {name} is stored as {stored}; supported: {', '.join(_DTYPES)}")
        return _DTYPES[stored]

    def read(self, name: str, shape: Sequence[int], dtype: torch.dtype, expert: int | None = None) -> torch.Tensor:
        """The tensor, which must have `shape`, or its `expert`-th slice along the first dimension, cast to `dtype`; finite."""
        self.dtype(name)
        stored = self._stored(name)
        if stored.get_shape() != list(shape):
            raise CheckpointError(f"{self._path(name)}: tensor {name} has shape {stored.get_shape()}, config.json says {list(shape)}")
        tensor: torch.Tensor = (stored[:] if expert is None else stored[expert]).to(dtype)
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{self._path(name)}: tensor {name} holds NaN or Inf as {dtype_name(dtype)}")
        return tensor

    def _path(self, name: str) -> Path:
        if name not in self._file_of:
            raise CheckpointError(f"{self.folder}: tensor {name} is missing")
        return self.folder / self._file_of[name]

    def _stored(self, name: str) -> Any:
        """Shape and type of a tensor, and its slices, which are read when indexed."""
        path = self._path(name)
        if path not in self._open:
            self._open[path] = _open(path)
        try:
            return self._open[path].get_slice(name)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: tensor {name} cannot be read: {error}") from None

    def _index(self) -> dict[str, str]:
        index = self.folder / _INDEX
        if index.is_file():
            files = read_json(index).get("weight_map")
            if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
                raise CheckpointError(f"{index} has no weight_map from tensor names to file names")
            for file in sorted(set(files.values())):
                if not (self.folder / file).is_file():
                    raise CheckpointError(f"{self.folder / file} is missing, but {_INDEX} names it")
            return files
        if not (self.folder / _SINGLE).is_file():
            raise CheckpointError(f"{self.folder} has neither {_SINGLE} nor {_INDEX}")
        return dict.fromkeys(_open(self.folder / _SINGLE).keys(), _SINGLE)


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a complete safetensors file: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError naming the file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return data
