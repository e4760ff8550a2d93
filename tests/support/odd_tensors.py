"""Tensors that say they are on the CPU, and have no numbers there."""

from __future__ import annotations

from typing import Any

import torch


class Elsewhere(torch.Tensor):
    """As DTensor and FakeTensor: a shape, with what it is of somewhere else."""

    @staticmethod
    def __new__(cls, *shape: int) -> Elsewhere:
        made: Elsewhere = torch.Tensor._make_wrapper_subclass(cls, torch.Size(shape), dtype=torch.float32)
        return made

    @classmethod
    def __torch_dispatch__(cls, *_: Any, **__: Any) -> Any:
        raise NotImplementedError

    def __repr__(self, **_: Any) -> str:
        return "Elsewhere()"


def freed(first: int = 0) -> torch.Tensor:
    """As FSDP leaves parameters behind, which are parts of one tensor: row `first` of it."""
    tensor = torch.ones(3, 4)[first : first + 1]
    tensor.untyped_storage().resize_(0)
    return tensor
