"""Calls that nobody waits for yet, of clients that are closed, dropped, or asked again from within their own callbacks."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from types import FrameType
from typing import Any

import pytest
import torch

from moeserve import errors
from moeserve.api.output import ForwardOutput
from moeserve.client import Client
from moeserve.client.connection import CALLING, Reach
from moeserve.client.line import Line
from moeserve.client.stubs import ServiceStubs
from moeserve.client.submitting import MAX_SUBMITTED, Submitter, _Work
from moeserve.programs.embedded_submit import SIDE_BY_SIDE, SubmittedCalls
from moeserve.v1 import moe_service_pb2 as pb
from tests.support.engine import FakeEngine, X
from tests.support.waiting import until


def threads_of_clients() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "moeserve-client"}


class Crowd:
    """As many calls as may be in progress, and `others` that wait for room; callbacks submit once these have what there was."""

    def __init__(self, submit: Callable[[], Future[Any]], room: int, others: int) -> None:
        self._submit, self._waiting, self._is_full = submit, others, threading.Event()
        self._lock = threading.Lock()
        self.next: list[Future[Any]] = []
        for _ in range(room):
            submit().add_done_callback(self._go_on)
        for _ in range(others):
            threading.Thread(target=self._wait_for_room, daemon=True).start()

    def _wait_for_room(self) -> None:
        self._submit()
        with self._lock:
            self._waiting -= 1
            if not self._waiting:
                self._is_full.set()

    def _go_on(self, _: Future[Any]) -> None:
        self._is_full.wait(10)
        self.next.append(self._submit())


def test_callbacks_submit_although_there_is_no_room(target: str, engine: FakeEngine) -> None:
    engine.gate.clear()
    with Client(target) as client:
        crowd = Crowd(lambda: client.submit(X[:1], layer=1), MAX_SUBMITTED, 1)
        until(lambda: len(engine.requests) == MAX_SUBMITTED)
        engine.open_gate()
        until(lambda: len(crowd.next) == MAX_SUBMITTED)
        assert all(torch.equal(each.result(30).hidden_states, 2 * X[:1]) for each in crowd.next)


def test_callbacks_of_an_embedded_client_submit_although_there_is_no_room() -> None:
    calls, go_on = SubmittedCalls(), threading.Event()
    crowd = Crowd(lambda: calls.submit(lambda: go_on.wait(30)), SIDE_BY_SIDE, SIDE_BY_SIDE)  # type: ignore[arg-type, return-value]
    go_on.set()
    until(lambda: len(crowd.next) == SIDE_BY_SIDE)
    assert all(each.result(30) for each in crowd.next)
    calls.close()


def test_a_callback_may_close_its_client(target: str, caplog: pytest.LogCaptureFixture) -> None:
    before, client = threads_of_clients(), Client(target)
    client.submit(X).add_done_callback(lambda _: client.close())
    until(lambda: threads_of_clients() <= before, 30)
    with pytest.raises(errors.MoEServeError, match="closed"):
        client.submit(X)
    assert not [record for record in caplog.records if record.name == "concurrent.futures"]


@pytest.mark.parametrize("step", range(1, 15))
def test_a_signal_handler_may_close_the_client_whose_call_it_interrupts(step: int, target: str) -> None:
    """Before any line of `submit`."""
    client, left, has_ended = Client(target), step, threading.Event()
    client.submit(X).result(30)

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        if frame.f_code not in (Submitter.submit.__code__, _Work.submit.__code__):
            return None
        if event == "line":
            left -= 1
            if left == 0:
                client.close()
        return trace

    def submit() -> None:
        sys.settrace(trace)
        with suppress(errors.MoEServeError, CancelledError):
            client.submit(X).result(30)
        has_ended.set()

    threading.Thread(target=submit, daemon=True).start()
    assert has_ended.wait(30) and left <= 0


def test_a_client_that_is_dropped_ends_with_its_last_call(target: str, engine: FakeEngine) -> None:
    before = threads_of_clients()
    engine.gate.clear()
    answer: Future[ForwardOutput] = Client(target).submit(X)
    until(lambda: engine.requests)
    gc.collect()
    engine.open_gate()
    assert torch.equal(answer.result(30).hidden_states, X)
    until(lambda: not gc.collect() and threads_of_clients() <= before, 30)


def test_a_call_that_meets_the_end_of_its_client_is_told_so(target: str) -> None:
    """As when one thread closes the client that another has just begun to call with."""
    line = Line(Reach(target, None, None, 10.0, CALLING), ServiceStubs)
    with pytest.raises(errors.MoEServeError, match=f"^this client of {target} is closed$"), line.call(None) as call:
        line.close().close()
        call.stubs.list_layers(pb.ListLayersRequest(), timeout=call.timeout_s)
