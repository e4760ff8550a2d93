"""Checkpoint folders of one layer whose weights a seed decides, and a service of one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch

from tests.support.checkpoints_on_disk import CONFIG, layer_tensors, write_folder

LAYER = "model.layers.0.mlp"

CONFIGURATION = {"model": {"dtype": "float32"}, "placement": {"num_hosts": 2}, "layers": [{"gating": {"top_k": 2}}]}


def configuration(checkpoint: Path) -> dict[str, object]:
    return {**CONFIGURATION, "model": {"checkpoint": checkpoint, "dtype": "float32"}}


def tokens(seed: int) -> torch.Tensor:
    return torch.randn(20, 8, generator=torch.Generator().manual_seed(seed))


def folder(path: Path, seed: int) -> Path:
    path.mkdir()
    generator = torch.Generator().manual_seed(seed)
    return write_folder(path, CONFIG, {name: torch.randn(tensor.shape, generator=generator) for name, tensor in layer_tensors().items()})


def replaced(served: Path, other: Path) -> None:
    """The files of `other`, in place of those that are served."""
    for file in other.iterdir():
        shutil.copyfile(file, served / f"{file.name}.new")
        os.replace(served / f"{file.name}.new", served / file.name)
