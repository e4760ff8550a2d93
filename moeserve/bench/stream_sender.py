"""Requests over one ForwardStream, awaited one by one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from types import TracebackType
from typing import Final, Self

from moeserve.api.output import ForwardOutput
from moeserve.api.wire import WireRequest
from moeserve.client import AsyncClient
from moeserve.errors import DeadlineExceeded, MoEServeError

_DAY_S: Final = 86_400.0


class StreamSender:
    """`await send(request)`; a stream that breaks fails the requests on it, and the next request opens another."""

    def __init__(self, client: AsyncClient, timeout_s: float | None) -> None:
        self._client = client
        self._timeout_s = timeout_s
        self._outgoing: asyncio.Queue[WireRequest | None] = asyncio.Queue()
        self._waiting: dict[str, asyncio.Future[ForwardOutput]] = {}
        self._reader: asyncio.Task[None] | None = None
        self._sent = 0

    async def send(self, request: WireRequest) -> ForwardOutput:
        """The answer. Raises the service's error, or DeadlineExceeded."""
        if self._reader is None or self._reader.done():
            self._outgoing = asyncio.Queue()
            self._reader = asyncio.create_task(self._read(self._outgoing))
        self._sent += 1
        request_id = str(self._sent)
        answer: asyncio.Future[ForwardOutput] = asyncio.get_running_loop().create_future()
        self._waiting[request_id] = answer
        self._outgoing.put_nowait(replace(request, request_id=request_id))
        try:
            async with asyncio.timeout(self._timeout_s):
                return await answer
        except TimeoutError:
            raise DeadlineExceeded(f"no answer within {self._timeout_s:g} s") from None
        finally:
            self._waiting.pop(request_id, None)

    async def _read(self, outgoing: asyncio.Queue[WireRequest | None]) -> None:
        try:
            async for answer in self._client.forward_stream(_until_none(outgoing), timeout=_DAY_S):
                waiting = self._waiting.get(answer.request_id)
                if waiting is None or waiting.done():
                    continue
                if isinstance(answer.result, MoEServeError):
                    waiting.set_exception(answer.result)
                else:
                    waiting.set_result(answer.result)
        except MoEServeError as error:
            for waiting in self._waiting.values():
                if not waiting.done():
                    waiting.set_exception(error)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._reader is None:
            return
        # End the stream: cancelling would count as a failed call. An interrupted stream has answers to come and is cancelled.
        if kind is None:
            self._outgoing.put_nowait(None)
            await asyncio.wait({self._reader}, timeout=self._timeout_s)
        self._reader.cancel()
        await asyncio.wait({self._reader})


async def _until_none(outgoing: asyncio.Queue[WireRequest | None]) -> AsyncIterator[WireRequest]:
    while (request := await outgoing.get()) is not None:
        yield request
