"""A loop that is run by whoever waits for it, of whom any may be interrupted."""

from __future__ import annotations

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
