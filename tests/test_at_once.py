"""Coroutines that begin in the call that starts them."""

from __future__ import annotations

import asyncio
import gc
import weakref

import pytest

from moeserve.loops import begin, to_its_end


class Work:
    """Writes down what happens to it; it waits for `gate` twice."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.gate: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.gate.add_done_callback(lambda gate: gate.cancelled() or gate.exception())

    async def run(self) -> str:
        self.seen.append("began")
        try:
            said = await self.gate
            await asyncio.sleep(0)
        except BaseException as error:
            self.seen.append(type(error).__name__)
            raise
        self.seen.append("ended")
        return said


async def nothing_to_wait_for() -> int:
    return 5


async def refuse() -> None:
    raise ValueError("no")


async def test_it_has_begun_when_the_call_returns() -> None:
    for start in (begin, to_its_end):
        work = Work()
        running = start(work.run())
        assert work.seen == ["began"]
        work.gate.set_result("yes")
        assert await running == "yes"
        assert work.seen == ["began", "ended"]


async def test_what_waits_for_nothing_is_done_at_once() -> None:
    for start in (begin, to_its_end):
        running = start(nothing_to_wait_for())
        assert running.done()
        assert await running == 5


async def test_an_error_is_for_whoever_waits() -> None:
    for start in (begin, to_its_end):
        work = Work()
        running = start(work.run())
        work.gate.set_exception(ValueError("later"))
        with pytest.raises(ValueError, match="later"):
            await running
    with pytest.raises(ValueError, match="no"):
        await to_its_end(refuse())


@pytest.mark.parametrize("turns", range(3))
async def test_whoever_cancels_what_was_begun_ends_it(turns: int) -> None:
    work = Work()
    running = begin(work.run())
    for _ in range(turns):
        await asyncio.sleep(0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert work.seen == ["began", "CancelledError"]


@pytest.mark.parametrize("turns", range(3))
async def test_nobody_cancels_what_runs_to_its_end(turns: int) -> None:
    work = Work()
    running = to_its_end(work.run())
    for _ in range(turns):
        await asyncio.sleep(0)
    running.cancel()
    await asyncio.sleep(0)
    assert not work.gate.cancelled()
    work.gate.set_result("yes")
    while "ended" not in work.seen:
        await asyncio.sleep(0)
    assert work.seen == ["began", "ended"]


async def test_an_error_that_nobody_waits_for_is_no_news(caplog: pytest.LogCaptureFixture) -> None:
    gc.collect()  # what earlier tests have left tells its errors now
    caplog.clear()
    running = to_its_end(refuse())
    await asyncio.sleep(0)
    del running
    gc.collect()
    assert "asyncio" not in {record.name for record in caplog.records}


@pytest.mark.parametrize("is_awaited", [True, False])
async def test_an_error_keeps_nothing_of_what_failed(is_awaited: bool) -> None:
    """Whoever raises it may keep it: gRPC does, in a future that the frame of its own traceback refers to."""
    error, gate = ZeroDivisionError(), asyncio.get_running_loop().create_future()

    async def fail(held: Work) -> None:
        await gate
        raise error

    work = Work()
    seen = weakref.ref(work)
    running = to_its_end(fail(work))
    del work
    if not is_awaited:
        running.cancel()
    gate.set_result(None)
    await asyncio.wait([running])
    await asyncio.sleep(0)
    assert seen() is None
