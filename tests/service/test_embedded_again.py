"""Frontends of a program that take the place of those that could not go on."""

from __future__ import annotations

import gc

from moeserve import EmbeddedClient
from moeserve.programs.embedded_frontend import EmbeddedFrontend
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
