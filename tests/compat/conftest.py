"""Tiny tensors: one thread, because handing them to several takes far longer than the work; the same numbers in any order of tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def own_numbers() -> None:
    """Of some rows, two experts are as good as each other: then a service and a layer may choose differently."""
    torch.manual_seed(0)
