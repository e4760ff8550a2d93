"""The processes of a Ray that this one starts: signals meant for this process do not reach them, and they end with it."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import ray

from moeserve.cluster import keeper
from moeserve.cluster.ray_internals import take_processes

#: what terminals, supervisors and control groups send to all processes of a service at once; ending Ray's is up to this one
_SHIELDED: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SIGACTION_BYTES: Final = 256  # more than the C library's struct has


class LocalRay:
    """Ray's processes, which have all their files in `folder`, started by `init` (a call of `ray.init`) from `start` to `stop`.

    They are started from a thread of their own that lives until they end: its signal mask is inherited by all of them, through exec too,
    and the kernel kills them when that thread is gone, as Ray has requested. A keeper ends the processes that Ray starts.
    """

    def __init__(self, folder: Path, init: Callable[[], Any]) -> None:
        self._folder = folder.resolve()
        self._init = init
        self._started: Future[None] = Future()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ray", daemon=True)

    def start(self) -> None:
        """Raises the error of `init`; `stop` ends the processes that were started."""
        self._thread.start()
        self._started.result()

    def stop(self) -> None:
        """Disconnect from Ray, then end its processes, which ignore the SIGTERM of `ray.shutdown`."""
        processes = take_processes()
        ray.shutdown()
        for process in processes:
            process.kill()
        keeper.end_processes(self._folder)
        for process in processes:
            process.wait()
        self._ending.set()
        self._thread.join()

    def _run(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, _SHIELDED)
        try:
            with self._kept():
                with kept_handlers():
                    self._init()
                self._started.set_result(None)
                self._ending.wait()
        except BaseException as error:
            self._started.set_exception(error)

    def _kept(self) -> subprocess.Popen[bytes]:
        """In a process with its own session, so that it outlives a killed process group."""
        command = [sys.executable, "-I", "-S", keeper.__file__, str(self._folder)]
        none = subprocess.DEVNULL
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=none, stderr=none, start_new_session=True)  # noqa: S603


@contextmanager
def kept_handlers() -> Iterator[None]:
    """Restores signal handlers afterwards: Ray's C++ makes signals abort, with a trace. Python sets them in the main thread only."""
    sigaction = ctypes.CDLL(None, use_errno=True).sigaction
    former = {number: ctypes.create_string_buffer(_SIGACTION_BYTES) for number in _SHIELDED}
    for number, action in former.items():
        sigaction(int(number), None, action)
    try:
        yield
    finally:
        for number, action in former.items():
            sigaction(int(number), action, None)
