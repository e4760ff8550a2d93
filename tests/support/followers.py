"""Frontends that follow a `ServiceHarness`: in threads of this process, or as processes."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from moeserve.config import ServerConfig
from moeserve.errors import MoEServeError
from moeserve.loops import LoopThread
from moeserve.programs.frontend import FrontendProgram
from moeserve.programs.grpc_orders import GrpcOrders

TOKEN = "follow"


class ThreadedFrontend:
    """`with ThreadedFrontend(service.control_target) as frontend: Client(frontend.target)`; `frontend.service` is the program itself."""

    def __init__(self, controller: str, node: str = "", token: str | Callable[[], str] = TOKEN, **more: Any) -> None:
        self._thread = LoopThread("frontend")
        self._orders, self._node, self._more = (controller, token, more.pop("tls", None)), node, more

    def call(self, work: Any) -> Any:
        return self._thread.call(work, 60)

    def __enter__(self) -> Self:
        self._thread.start()
        try:
            self.call(self._start())
        except BaseException:
            self._thread.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.call(self.service.stop())
        finally:
            self._thread.stop()

    async def _start(self) -> None:
        timeout_s = self._more.pop("timeout_s", 30.0)
        server = ServerConfig(port=0, metrics_port=0, **self._more.pop("server", {}))
        self.service = FrontendProgram(server, GrpcOrders(*self._orders), node=self._node, **self._more)
        await self.service.start(timeout_s)
        self.target = self.service.target

    @property
    def broken(self) -> MoEServeError | None:
        return self.service.broken.result() if self.service.broken.done() else None


class FrontendProcess:
    """`moeserve frontend` as a user runs it; `target` once it is ready."""

    def __init__(self, controller: str, token_file: Path, *flags: str, before: Sequence[str] = (), stderr: int = subprocess.PIPE) -> None:
        command = [*before, sys.executable, "-c", "from moeserve.cli.app import entry; entry()", "frontend", "--controller", controller]
        command += ["--frontend-token-file", str(token_file), "--port", "0", "--metrics-port", "0", *flags]
        self.process = subprocess.Popen(command, stderr=stderr, text=True)
        #: what it has said
        self.said: deque[str] = deque()

    @property
    def target(self) -> str:
        return self.until(r"^ready (127\.0\.0\.1:\d+)$")[1]

    def until(self, pattern: str) -> re.Match[str]:
        """The first line from now on that matches."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)
            if match := re.search(pattern, line):
                return match
        raise AssertionError(f"{pattern} never came, but:\n{''.join(self.said)}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.process.kill()
        self.process.communicate()
