"""The processes of a Ray that this one starts: signals meant for this process do not reach them, and they end with it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import ray
from ray._private import worker

#: what terminals, supervisors and control groups send to all processes of a service at once; ending Ray's is up to this one
_SHIELDED: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_END_TIMEOUT_S: Final = 5.0
_LOOK_S: Final = 0.01


class LocalRay:
    """Ray's processes, started by `init` (a call of `ray.init`) from `start` to `stop`.

    They are started from a thread of their own that lives until they end: its signal mask is inherited by all of them, through exec too,
    and the kernel kills them when that thread is gone, as Ray has asked it to, however this process ends.
    """

    def __init__(self, init: Callable[[], Any]) -> None:
        self._init = init
        self._started: Future[None] = Future()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ray", daemon=True)

    def start(self) -> None:
        """Raises what `init` raises; `stop` ends whatever of Ray is there then."""
        self._thread.start()
        self._started.result()

    def stop(self) -> None:
        """Leave Ray, then end its processes: first the raylet, which would replace others."""
        roots = _children_of_thread(self._thread.native_id)
        pids = [pid for root in reversed(roots) for pid in (root, *_descendants(root))]
        if worker._global_node is not None:
            worker._global_node.all_processes.clear()  # or Ray would wait for each to hear a SIGTERM
        ray.shutdown()
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._ending.set()
        self._thread.join()
        for root in roots:
            with suppress(ChildProcessError):
                os.waitpid(root, 0)
        await_end(pids)

    def _run(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, _SHIELDED)
        try:
            self._init()
        except BaseException as error:
            self._started.set_exception(error)
        else:
            self._started.set_result(None)
        self._ending.wait()


def _children_of_thread(thread: int | None) -> list[int]:
    """In the order in which they were started."""
    with suppress(FileNotFoundError):
        return [int(pid) for pid in Path(f"/proc/self/task/{thread}/children").read_text().split()]
    return []


def _descendants(pid: int) -> Iterator[int]:
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(FileNotFoundError, ProcessLookupError):
            for child in map(int, children.read_text().split()):
                yield child
                yield from _descendants(child)


def await_end(pids: list[int]) -> None:
    """Those of Ray's that are nobody's children any more are reaped by whoever does that here, which may take a moment."""
    deadline = time.monotonic() + _END_TIMEOUT_S
    while any(map(_is_running, pids)) and time.monotonic() < deadline:
        time.sleep(_LOOK_S)


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
