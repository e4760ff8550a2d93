"""An event loop in a thread of its own, which anybody may stop."""

from __future__ import annotations

import asyncio
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

from moeserve.loops import LoopThread


def test_several_threads_may_stop_it_at_the_same_time() -> None:
    together = threading.Barrier(3)

    def stop(thread: LoopThread) -> None:
        together.wait()
        thread.stop()

    with ThreadPoolExecutor(3) as pool:
        for _ in range(100):
            thread = LoopThread("loop")
            thread.start()
            for stopping in [pool.submit(stop, thread) for _ in range(3)]:
                stopping.result()


def test_a_callback_that_would_end_a_program_ends_nobody_elses_work() -> None:
    thread = LoopThread("loop")
    thread.submit(asyncio.sleep(0)).add_done_callback(lambda _: sys.exit(1))
    waiting = thread.submit(asyncio.sleep(0.01, "answered"))
    thread.start()
    assert waiting.result(10) == "answered"
    thread.stop()
    assert not thread.is_running
