"""A service in a thread of the program that has started it: how it is stopped."""

from __future__ import annotations

import socket
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from threading import Barrier
from typing import Any

import pytest

import moeserve
from moeserve.programs.background import BackgroundService
from tests.support.two_layers import CONFIG

MANY = 4
RUNNING = {**CONFIG, "server": {"port": 0, "metrics_port": 0}}


@pytest.fixture
def service() -> Iterator[BackgroundService]:
    with moeserve.serve(RUNNING, cluster="threads") as service:
        yield service


def test_ctrl_c_at_the_moment_when_it_is_ready_undoes_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    service = BackgroundService(moeserve.load_config({**RUNNING, "cluster": {"kind": "threads"}}), lambda _: None)
    call, calls = service._thread.call, count()

    def interrupted(work: Coroutine[Any, Any, None]) -> None:
        call(work)
        if next(calls) == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(service._thread, "call", interrupted)
    with pytest.raises(KeyboardInterrupt):
        service.start()
    host, port = service.target.split(":")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)))


def test_several_threads_may_stop_it(service: BackgroundService, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them ends the loop, which cannot be ended twice at a time; the others wait for that."""
    together, ended, end = Barrier(MANY), [], service._thread.stop
    monkeypatch.setattr(service._thread, "stop", lambda: ended.append(end()))

    def stop() -> None:
        together.wait()
        service.stop()

    with ThreadPoolExecutor(MANY) as pool:
        for stopped in [pool.submit(stop) for _ in range(MANY)]:
            stopped.result(60)
    assert len(ended) == 1 and service.failure is None


def test_one_that_was_stopped_is_not_changed(service: BackgroundService) -> None:
    service.stop()
    for change in (lambda: service.scale(1), lambda: service.drain_host("host-0"), lambda: service.swap("layers.0", "/nowhere")):
        with pytest.raises(moeserve.MoEServeError, match=r"this service at 127\.0\.0\.1:\d+ has been stopped"):
            change()


def test_one_is_not_changed_on_its_own_thread(service: BackgroundService) -> None:
    """As by a handler of its log records: it would wait for itself, and nobody would be answered any more."""

    async def change() -> None:
        service.scale(1)

    with pytest.raises(moeserve.MoEServeError, match="cannot be changed on its own thread"):
        service._thread.call(change(), 30)


def test_one_whose_end_fails_has_ended_all_the_same(service: BackgroundService, monkeypatch: pytest.MonkeyPatch) -> None:
    end = service._service.stop

    async def fail() -> None:
        await end()
        raise RuntimeError("as of Ray")

    monkeypatch.setattr(service._service, "stop", fail)
    with pytest.raises(RuntimeError, match="as of Ray"):
        service.stop()
    service.stop()
    with pytest.raises(moeserve.MoEServeError, match="has been stopped"):
        service.scale(1)


def test_it_may_be_stopped_on_its_own_thread(service: BackgroundService) -> None:
    """As by a handler of its log records, which nothing waits for there."""

    async def stop() -> None:
        service.stop()

    service._thread.call(stop(), 30)
    service._ending.result(60)
    assert service.failure is None
