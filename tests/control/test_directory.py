"""Finding the present incarnation of a host."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import pytest

from moeserve.control import timing
from moeserve.control.directory import Directory
from moeserve.observe.stats import HostInfo

HOST = HostInfo("host-0", ("tcp://127.0.0.1:1",))


async def test_a_host_is_waited_for() -> None:
    directory = Directory()
    finding = asyncio.create_task(directory.find(0))
    directory.replace({1: HOST})
    await asyncio.sleep(0)
    assert not finding.done()
    directory.replace({0: HOST})
    assert await finding == HOST


async def test_who_could_not_reach_it_gets_the_next_incarnation_as_soon_as_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "PATIENCE_S", 3600.0)
    directory, reborn = Directory(), replace(HOST, pid=2)
    directory.replace({0: HOST})
    assert await directory.find(0) == HOST
    again = asyncio.create_task(directory.find(0))
    directory.replace({0: HOST, 1: HOST})
    for _ in range(3):
        await asyncio.sleep(0)
    assert not again.done()
    directory.replace({0: reborn})
    assert await again == reborn


async def test_the_same_is_tried_again_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "PATIENCE_S", 0.05)
    directory = Directory()
    directory.replace({0: HOST})
    started = time.monotonic()
    assert [await directory.find(0) for _ in range(2)] == [HOST, HOST]
    assert time.monotonic() - started >= 0.05
