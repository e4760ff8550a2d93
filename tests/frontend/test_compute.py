"""Tensor work in a thread: it runs to its end, and whoever gave it up hears of that as if it had waited for anything else."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from moeserve.frontend.compute import Compute

LARGE = 2**20


@pytest.fixture
def compute() -> Iterator[Compute]:
    made = Compute()
    yield made
    made.close()


async def work(compute: Compute, ended: threading.Event) -> None:
    """In a thread until it has `ended`; then a wait without end."""
    await compute(LARGE, ended.wait)
    await asyncio.get_running_loop().create_future()


async def test_a_time_out_in_the_middle_is_one(compute: Compute) -> None:
    ended = threading.Event()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            asyncio.get_running_loop().call_soon(ended.set)  # after the time is over
            await work(compute, ended)


async def test_a_task_that_was_cancelled_in_the_middle_is(compute: Compute) -> None:
    ended = threading.Event()
    task = asyncio.create_task(work(compute, ended))
    await asyncio.sleep(0)
    task.cancel()
    ended.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelling() == 1
