"""Records what a frontend is asked while it is measured: a trace that can be played."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final, TextIO

from moeserve.client import AsyncClient
from moeserve.errors import MoEServeError
from moeserve.observe.stats import ServiceStats
from moeserve.observe.summary import counts_on, demand

#: between two lines
_EVERY_S: Final = 1.0


async def record(client: AsyncClient, file: TextIO, measure: Callable[[], Awaitable[None]]) -> None:
    """Awaits `measure()` and meanwhile writes once a second what its frontend was asked, by any caller, and the rest at the end.

    Seconds in which the frontend does not answer are told with those after them. One that is started again counts from 0.
    """
    before = await client.stats()
    file.write(json.dumps({"layers": {layer.name: len(demand(layer)) for layer in before.layers}}) + "\n")
    started_s, measuring = time.monotonic(), asyncio.ensure_future(measure())
    try:
        while not measuring.done():
            await asyncio.wait([measuring], timeout=_EVERY_S)
            with suppress(MoEServeError):
                now = await client.stats()
                _write(file, before, now, time.monotonic() - started_s)
                before = now
    finally:
        measuring.cancel()
        await asyncio.gather(measuring, return_exceptions=True)
    await measuring


def _write(file: TextIO, before: ServiceStats, now: ServiceStats, at_s: float) -> None:
    rows = [demand(layer) for layer in now.layers]
    if counts_on(now, before):
        rows = [[new - old for new, old in zip(*both, strict=True)] for both in zip(rows, map(demand, before.layers), strict=True)]
    file.write(json.dumps({"at_s": round(at_s, 6), "rows": rows}) + "\n")
    file.flush()
