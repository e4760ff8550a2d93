"""Frontends of a program that take the place of those that could not go on."""

from __future__ import annotations

import gc
import threading

import pytest

from moeserve import Cancelled, EmbeddedClient
from moeserve.programs.embedded_frontend import EmbeddedFrontend
from moeserve.programs.grpc_orders import GrpcOrders
from tests.support.waiting import until


def frontends() -> int:
    return sum(type(one) is EmbeddedFrontend for one in gc.get_objects())


def test_a_frontend_that_was_replaced_is_not_kept() -> None:
    """A program that asks again and again for a service that is not there does not grow."""
    before = frontends()
    with EmbeddedClient("127.0.0.1:1", "token", retry=False) as client:
        for _ in range(3):
            assert not client.ready(timeout=20)
        until(lambda: not gc.collect() and frontends() <= before + 1, 20)


def test_one_that_is_closed_before_it_has_begun_never_begins() -> None:
    """A program closes its client while another of its threads makes the first call: nothing of it stays."""
    before = set(threading.enumerate())
    frontend = EmbeddedFrontend(GrpcOrders("127.0.0.1:1", "token"), "", "", 0.0)
    frontend.close()
    with pytest.raises(Cancelled, match="this client was closed"):
        frontend.reach(20)
    assert set(threading.enumerate()) <= before
    assert frontend._driven.loop.is_closed()
