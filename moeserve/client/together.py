"""Small calls that start together travel in one message: a call of its own costs a service more than the token it brings.

The first call goes at once. Calls that start while others are in progress wait for the end of the event loop's turn, which takes
microseconds, and those to the same layer with the same time left then go as one `ForwardMany`.
"""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import Awaitable, Callable
from typing import Final

from moeserve.api.together import MAX_REQUESTS, join, split
from moeserve.client.retries import Retries
from moeserve.errors import InvalidRequest, MoEServeError, NotOffered

#: larger requests gain nothing
_SMALL_BYTES: Final = 64 * 2**10
_FULL_BYTES: Final = 2**20

#: method, message, timeout in seconds -> answer
Send = Callable[[str, bytes, float | None], Awaitable[bytes]]
_Key = tuple[asyncio.AbstractEventLoop, int | str | None, float | None]


class Together:
    """The calls of one client, on any event loop."""

    def __init__(self) -> None:
        self._running = 0
        self._open: dict[_Key, _Group] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        #: false for a service that is older than this
        self._is_offered = True

    async def call(self, send: Send, message: bytes, layer: int | str | None, timeout_s: float | None) -> bytes:
        """The answer to a `ForwardRequest`: an output, or, if it came with others, its error. Raises what `send` raises."""
        self._running += 1
        try:
            if self._running == 1 or len(message) > _SMALL_BYTES or not self._is_offered:
                return await send("forward", message, timeout_s)
            return await self._join(send, message, (asyncio.get_running_loop(), layer, timeout_s))
        finally:
            self._running -= 1

    def _join(self, send: Send, message: bytes, key: _Key) -> asyncio.Future[bytes]:
        group = self._open.get(key)
        if group is None or not group.has_room(message):
            group = self._open[key] = _Group()
            key[0].call_soon(self._leave, send, key, group)
        return group.add(message, key[0])

    def _leave(self, send: Send, key: _Key, group: _Group) -> None:
        if self._open.get(key) is group:
            del self._open[key]
        if group.is_abandoned:
            return
        group.task = key[0].create_task(self._answer(send, group, key[2]))
        self._tasks.add(group.task)
        group.task.add_done_callback(self._tasks.discard)

    async def _answer(self, send: Send, group: _Group, timeout_s: float | None) -> None:
        messages, answers, time_of_call = group.messages, group.answers, Retries(timeout_s, time.monotonic())
        try:
            if len(messages) == 1:
                found = [await send("forward", messages[0], timeout_s)]
            else:
                found = list(split(await send("forward_many", join(messages), timeout_s)))
                if len(found) != len(messages):
                    raise MoEServeError(f"the service answered {len(messages)} requests by {len(found)} answers")
        except MoEServeError as error:
            if len(messages) > 1 and self._goes_alone(error):
                left_s = time_of_call.left_s(time.monotonic())
                await asyncio.gather(*(_alone(send, *each, left_s) for each in zip(messages, answers, strict=True)))
                return
            for answer in answers:
                _fail(answer, error)
        else:
            for answer, data in zip(answers, found, strict=True):
                if not answer.done():
                    answer.set_result(data)
        finally:
            for answer in answers:
                answer.cancel()  # where this task was cancelled

    def _goes_alone(self, error: MoEServeError) -> bool:
        """Whether the message was refused for what it was, as by a service with a smaller limit, or one that does not know it."""
        self._is_offered = self._is_offered and not isinstance(error, NotOffered)
        return isinstance(error, InvalidRequest) or not self._is_offered

    def __reduce__(self) -> tuple[type[Together], tuple[()]]:
        return Together, ()


class _Group:
    """Calls that go together."""

    def __init__(self) -> None:
        self.messages: list[bytes] = []
        self.answers: list[asyncio.Future[bytes]] = []
        self.task: asyncio.Task[None] | None = None
        self._nbytes = 0

    @property
    def is_abandoned(self) -> bool:
        """Whether nobody waits for an answer any more."""
        return all(answer.cancelled() for answer in self.answers)

    def has_room(self, message: bytes) -> bool:
        return len(self.messages) < MAX_REQUESTS and self._nbytes + len(message) <= _FULL_BYTES

    def add(self, message: bytes, loop: asyncio.AbstractEventLoop) -> asyncio.Future[bytes]:
        answer: asyncio.Future[bytes] = loop.create_future()
        answer.add_done_callback(self._one_left)
        self.messages.append(message)
        self.answers.append(answer)
        self._nbytes += len(message)
        return answer

    def _one_left(self, answer: asyncio.Future[bytes]) -> None:
        if answer.cancelled() and self.task is not None and self.is_abandoned:
            self.task.cancel()


async def _alone(send: Send, message: bytes, answer: asyncio.Future[bytes], timeout_s: float | None) -> None:
    try:
        data = await send("forward", message, timeout_s)
    except MoEServeError as error:
        _fail(answer, error)
    else:
        if not answer.done():
            answer.set_result(data)


def _fail(answer: asyncio.Future[bytes], error: MoEServeError) -> None:
    """Each raises an error of its own: one that is raised twice keeps the frames of both."""
    if not answer.done():
        answer.set_exception(copy.copy(error))
