"""A service ends although Ray has ended before it, or does not answer."""

from __future__ import annotations

import asyncio

import pytest

from moeserve.cluster import ray_loss
from moeserve.cluster.cluster import Loss
from moeserve.cluster.ray_loss import unless_lost

LONG_S = 3600.0


async def never() -> None:
    await asyncio.Event().wait()


async def test_hosts_are_left_to_a_ray_that_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    async def lost() -> Loss:
        return Loss("a process of Ray has ended", is_final=True)

    monkeypatch.setattr(ray_loss, "until_lost", lost)
    async with asyncio.timeout(30):
        await unless_lost(never(), LONG_S)


async def test_hosts_are_left_to_a_ray_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(ray_loss, "until_lost", never)
    async with asyncio.timeout(30):
        await unless_lost(never(), 0.01)
    assert "Ray does not answer any more: hosts are left to it" in caplog.messages


async def test_else_they_end_and_an_error_is_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fails() -> None:
        raise ValueError("of a host")

    monkeypatch.setattr(ray_loss, "until_lost", never)
    await unless_lost(asyncio.sleep(0), LONG_S)
    with pytest.raises(ValueError, match="of a host"):
        await unless_lost(fails(), LONG_S)
