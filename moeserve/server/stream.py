"""Many messages over one call: answered concurrently, in the order they finish."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, Final

import grpc

from moeserve.errors import MoEServeError, Overloaded
from moeserve.server.rpc import Context
from moeserve.server.transfers import Transfers

#: messages of one stream that are answered side by side; further ones are not read
MAX_STREAM_REQUESTS: Final = 64

#: messages of one stream that are answered concurrently before its caller has read an answer
FIRST_BYTES: Final = 8 * 2**20


#: what is left to read while there is no room is looked at again after so long
_LOOK_AGAIN_S: Final = 0.1

Answer = Callable[[bytes, MoEServeError | None], Coroutine[None, None, bytes]]


async def answer_all(context: Context, answer: Answer, stop: asyncio.Event, transfers: Transfers, max_bytes: int) -> bool:
    """Writes `answer(message, None)` for every message of the call, or `answer(message, refusal)` for one that there is no room for.

    Returns whether the caller ended it (rather than `stop`). Nothing is read while MAX_STREAM_REQUESTS answers are being made, or answers
    to `max_bytes` of messages, or one is being written, or the budget of all calls is spent: flow control slows down a caller that is too
    fast, or does not read. The byte limit starts at FIRST_BYTES and grows by every byte that the caller reads, so little is kept for a
    caller that never reads. After `stop`, messages that were read are still answered. Cancelling this, or an exception of `answer`, cancels
    all answers in progress.
    """
    stopping = asyncio.create_task(stop.wait())
    stream = _Stream(context, answer, transfers, max_bytes)
    is_listening, ended_by_caller = True, False
    try:
        while is_listening or stream.running:
            inputs = (stopping, *stream.awaited()) if is_listening else ()
            timeout_s = None if transfers.budget.has_room or not is_listening else _LOOK_AGAIN_S
            done, _ = await asyncio.wait((*stream.running, *inputs), return_when=asyncio.FIRST_COMPLETED, timeout=timeout_s)
            await stream.write([answer for answer in stream.running if answer in done])
            if stopping in done:
                is_listening = False
            elif stream.reading in done and not stream.begin():
                is_listening, ended_by_caller = False, True
    finally:
        stopping.cancel()
        await stream.close()
    return ended_by_caller


class InOrder:
    """Answers of one stream that end in the order in which they were begun."""

    def __init__(self) -> None:
        self._last = asyncio.Event()
        self._last.set()

    def after(self, answer: Callable[[], Coroutine[None, None, bytes]]) -> Coroutine[None, None, bytes]:
        """`answer`, as the last one of those that were given so far."""
        before, self._last = self._last, asyncio.Event()
        return self._run(answer, before, self._last)

    async def _run(self, answer: Callable[[], Coroutine[None, None, bytes]], before: asyncio.Event, ended: asyncio.Event) -> bytes:
        try:
            made = await answer()
            del answer  # which has the message
            await before.wait()
            return made
        finally:
            ended.set()


class _Stream:
    """The message that is being read, if any, and the answers that are being made, with the bytes that are kept for each."""

    def __init__(self, context: Context, answer: Answer, transfers: Transfers, max_bytes: int) -> None:
        self._context, self._answer, self._transfers, self._max_bytes = context, answer, transfers, max_bytes
        self._allowed_bytes = FIRST_BYTES
        self.reading: asyncio.Future[Any] | None = None
        self.running: dict[asyncio.Task[bytes], int] = {}

    def awaited(self) -> Sequence[asyncio.Future[Any]]:
        """The reading of the next message, once there is room for one."""
        if self.reading is None and self._has_room():
            self.reading = self._transfers.begin_read(self._context)
        return () if self.reading is None else (self.reading,)

    def _has_room(self) -> bool:
        kept_bytes = sum(self.running.values())
        is_below = len(self.running) < MAX_STREAM_REQUESTS and kept_bytes < min(self._allowed_bytes, self._max_bytes)
        return is_below and self._transfers.budget.has_room

    def begin(self) -> bool:
        """Has what was read answered. False = it was the end."""
        assert self.reading is not None
        message, self.reading = self.reading.result(), None
        if message is grpc.aio.EOF:
            return False
        self._transfers.arriving.took(self._context, len(message))
        try:
            self._transfers.budget.take(len(message))
        except Overloaded as refusal:
            self.running[asyncio.create_task(self._answer(message, refusal.with_traceback(None)))] = 0
        else:
            self.running[asyncio.create_task(self._answer(message, None))] = len(message)
        return True

    async def write(self, answers: Iterable[asyncio.Task[bytes]]) -> None:
        """One after the other."""
        for task in answers:
            self._transfers.budget.add(-self.running.pop(task))
            nbytes = len(task.result())
            await self._transfers.write(self._context, task.result(), nbytes)
            self._allowed_bytes += nbytes

    async def close(self) -> None:
        """Nobody waits for any more of it."""
        self._transfers.budget.add(-sum(self.running.values()))
        for unfinished in self.running:
            unfinished.cancel()
        await asyncio.gather(*self.running, return_exceptions=True)
