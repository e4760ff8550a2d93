"""What a thread has set for tensors: casts that torch makes by itself, a default device, modes. It is not meant for ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def are_plain() -> bool:
    """Whether this thread computes tensors as any other does."""
    return not (torch.is_autocast_enabled("cpu") or torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack())


@contextmanager
def put_aside() -> Iterator[None]:
    """Here, a tensor is on the CPU unless a device is given, as compiled code takes for granted, and none is cast to another type."""
    if are_plain():
        yield
        return
    with torch.autocast("cpu", enabled=False), torch.device("cpu"):
        yield
