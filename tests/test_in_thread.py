"""Work in threads of their own."""

from __future__ import annotations

import asyncio
import threading

import pytest

from moeserve.loops import in_thread


async def test_an_error_that_no_coroutine_can_raise_is_another_one() -> None:
    """As of a plug-in's `next()`; whoever waits must not wait for ever."""
    async with asyncio.timeout(10):
        with pytest.raises(RuntimeError, match="raised StopIteration"):
            await in_thread(next, iter(()))


async def test_where_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """As at the end of Python 3.12, where what stops a service uses it."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert await in_thread(sum, (1, 2)) == 3
    with pytest.raises(ValueError, match="invalid literal"):
        await in_thread(int, "x")
