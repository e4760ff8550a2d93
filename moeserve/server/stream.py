"""Many messages over one call: answered side by side, in the order they finish."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine

import grpc

from moeserve.server.rpc import Context


async def answer_all(
    context: Context, answer: Callable[[bytes], Coroutine[None, None, bytes]], stop: asyncio.Event, max_running: int
) -> bool:
    """Writes `answer(message)` for every message of the call. Returns whether the caller ended it (rather than `stop`).

    Nothing is read while `max_running` answers are being made or one is being written, so a caller that is too fast, or
    does not read, is slowed down by flow control. After `stop`, what was read is still answered. Cancelling this, or an
    exception out of `answer`, cancels every answer that is being made.
    """
    stopping = asyncio.create_task(stop.wait())
    reading = asyncio.create_task(context.read())
    running: set[asyncio.Task[bytes]] = set()
    is_listening, ended_by_caller = True, False
    try:
        while is_listening or running:
            inputs = (reading, stopping) if is_listening and len(running) < max_running else ()
            done, _ = await asyncio.wait((*running, *inputs), return_when=asyncio.FIRST_COMPLETED)
            for task in running & done:
                running.remove(task)
                await context.write(task.result())
            if stopping in done:
                is_listening = False
            elif reading in done and reading.result() is grpc.aio.EOF:
                is_listening, ended_by_caller = False, True
            elif reading in done:
                running.add(asyncio.create_task(answer(reading.result())))
                reading = asyncio.create_task(context.read())
    finally:
        leftover = (stopping, reading, *running)
        for unfinished in leftover:
            unfinished.cancel()
        await asyncio.gather(*leftover, return_exceptions=True)
    return ended_by_caller
