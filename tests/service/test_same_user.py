"""A program of the same user is let in, however busy the controller's event loop is."""

from __future__ import annotations

import time

from moeserve.addresses import parse_target
from moeserve.loops import LoopThread
from moeserve.programs.same_user import SameUserDoor, ask
from tests.support.ports import kept_port

BUSY_S = 1.5


def test_a_busy_loop_answers_late() -> None:
    thread, door, port = LoopThread("controller"), SameUserDoor("its token", "its node"), kept_port()
    thread.start()
    try:
        thread.call(door.open(port))
        thread.soon(time.sleep, BUSY_S)
        invitation = ask(parse_target(f"127.0.0.1:{port}"))
        assert invitation is not None and (invitation.token, invitation.node) == ("its token", "its node")
        thread.soon(door.close)
    finally:
        thread.stop()
