"""Many messages over one call: answered concurrently, in the order they finish."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Final

import grpc

from moeserve.server.rpc import Context

#: messages of one stream that are answered concurrently before its caller has read an answer
FIRST_BYTES: Final = 8 * 2**20


async def answer_all(
    context: Context, answer: Callable[[bytes], Coroutine[None, None, bytes]], stop: asyncio.Event, max_running: int, max_bytes: int
) -> bool:
    """Writes `answer(message)` for every message of the call. Returns whether the caller ended it (rather than `stop`).

    Nothing is read while `max_running` answers are being made, or answers to `max_bytes` of messages, or one is being written: flow
    control slows down a caller that is too fast, or does not read. The byte limit starts at FIRST_BYTES and grows by every byte that
    the caller reads, so little is kept for a caller that never reads. After `stop`, messages that were read are still answered.
    Cancelling this, or an exception of `answer`, cancels all answers in progress.
    """
    stopping = asyncio.create_task(stop.wait())
    reading = asyncio.create_task(context.read())
    running: dict[asyncio.Task[bytes], int] = {}
    allowed_bytes = FIRST_BYTES
    is_listening, ended_by_caller = True, False
    try:
        while is_listening or running:
            has_room = len(running) < max_running and sum(running.values()) < min(allowed_bytes, max_bytes)
            inputs = (reading, stopping) if is_listening and has_room else ()
            done, _ = await asyncio.wait((*running, *inputs), return_when=asyncio.FIRST_COMPLETED)
            for task in running.keys() & done:
                del running[task]
                await context.write(task.result())
                allowed_bytes += len(task.result())
            if stopping in done:
                is_listening = False
            elif reading in done and reading.result() is grpc.aio.EOF:
                is_listening, ended_by_caller = False, True
            elif reading in done:
                running[asyncio.create_task(answer(reading.result()))] = len(reading.result())
                reading = asyncio.create_task(context.read())
    finally:
        leftover = (stopping, reading, *running)
        for unfinished in leftover:
            unfinished.cancel()
        await asyncio.gather(*leftover, return_exceptions=True)
    return ended_by_caller
