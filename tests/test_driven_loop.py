"""A loop that is run by whoever waits for it, of whom any may be interrupted."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from moeserve.loops.driven_loop import DrivenLoop, Waiter

#: of `wait` and of what it calls before it sleeps or runs the loop
STEPS = 8


def interrupted_at(step: int, work: Callable[[], None]) -> None:
    """Does `work`, and Ctrl-C comes before the line of the loop's class that is the `step`-th."""
    left = step

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        if frame.f_code not in (DrivenLoop.wait.__code__, DrivenLoop._is_mine.__code__):
            return None
        if event == "line":
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_who_is_interrupted_leaves_the_loop_to_others(step: int) -> None:
    driven = DrivenLoop("test")
    with pytest.raises(KeyboardInterrupt):
        interrupted_at(step, lambda: driven.wait(Waiter.done))
    driven.start()
    later = threading.Thread(target=driven.wait, args=(Waiter.done,), daemon=True)
    later.start()
    later.join(30)
    assert not later.is_alive()
    driven.loop.call_soon_threadsafe(driven.stop)


FORKING = """
import gc, os, threading
from moeserve.loops import DrivenLoop

driven = DrivenLoop("test")
if (child := os.fork()) == 0:
    del driven
    gc.collect()
    os._exit(0)
os.waitpid(child, 0)
driven.start()
for _ in range(20):  # between them, it sleeps
    called = threading.Event()
    driven.loop.call_soon_threadsafe(called.set)
    assert called.wait(20)
print("awake")
"""


def test_a_forked_process_that_drops_a_loop_leaves_its_parent_awake() -> None:
    found = subprocess.run([sys.executable, "-c", FORKING], capture_output=True, text=True, timeout=60, check=False)
    assert (found.stdout, found.stderr) == ("awake\n", "")


def test_who_begins_to_wait_while_a_loop_ends_is_not_left_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that may not run it itself."""
    driven, refused = DrivenLoop("test"), threading.Event()
    close = driven.loop.close

    def wait() -> None:
        with pytest.raises(RuntimeError, match="closed"):
            driven.wait(Waiter.done, may_drive=False)
        refused.set()

    waiting = threading.Thread(target=wait, daemon=True)

    def begin_to_wait_and_close() -> None:
        waiting.start()
        waiting.join(0.3)
        close()

    monkeypatch.setattr(driven.loop, "close", begin_to_wait_and_close)
    driven.start()
    driven.loop.call_soon_threadsafe(driven.stop)
    assert refused.wait(60)
