"""The further frontends of `serve`, where server.processes is more than 1: processes that share its port."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from moeserve.errors import MoEServeError
from moeserve.programs.interpreter import interpreter
from moeserve.programs.timing import PROCESS_END_S, PROCESS_RESTART_S, PROCESS_SLOWEST_RESTART_S

log = logging.getLogger(__name__)


class FrontendProcesses:
    """As many processes as there are `names`; each that ends is started again.

    `told` is what `frontend_process` reads, without its name.
    """

    def __init__(self, names: list[str], told: Mapping[str, Any], drain_timeout_s: float) -> None:
        self._processes = [_Supervised({**told, "name": name, "log_level": logging.getLogger().level or logging.WARNING}) for name in names]
        self._drain_timeout_s = drain_timeout_s
        self._keeping: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Starts them; returns when all are ready. Raises the error of one that cannot start."""
        await asyncio.gather(*(one.start() for one in self._processes))
        self._keeping = [asyncio.create_task(one.keep()) for one in self._processes]

    async def stop(self) -> None:
        """Drain and end all of them."""
        for task in self._keeping:
            task.cancel()
        await asyncio.gather(*self._keeping, return_exceptions=True)
        await asyncio.gather(*(one.stop(self._drain_timeout_s + PROCESS_END_S) for one in self._processes))

    def hurry(self) -> None:
        """While they drain: end them now."""
        for one in self._processes:
            one.kill()


class _Supervised:
    """One process, and the next one when it has ended."""

    def __init__(self, told: Mapping[str, Any]) -> None:
        self._told = told
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        command = [*interpreter(), "-m", "moeserve.programs.frontend_process"]
        pipe = asyncio.subprocess.PIPE
        # In a session of its own, Ctrl-C does not reach it: it ends as it is told.
        process = self._process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, start_new_session=True)
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(self._told).encode() + b"\n")
        line = await process.stdout.readline()
        said = json.loads(line) if line else {"error": f"its process has ended with exit code {await process.wait()}"}
        if "error" in said:
            self.kill()
            await process.wait()
            raise MoEServeError(f"{self._told['name']} cannot start: {said['error']}")

    async def keep(self) -> None:
        """Starts it again whenever it ends, until cancelled."""
        pause_s = PROCESS_RESTART_S
        while True:
            assert self._process is not None
            code = await self._process.wait()
            log.warning("%s has ended with exit code %d; it is started again", self._told["name"], code)
            while True:
                await asyncio.sleep(pause_s)
                try:
                    await self.start()
                except (MoEServeError, OSError) as error:
                    log.warning("%s; it is tried again", error)
                    pause_s = min(2 * pause_s, PROCESS_SLOWEST_RESTART_S)
                else:
                    pause_s = PROCESS_RESTART_S
                    break

    async def stop(self, timeout_s: float) -> None:
        process = self._process
        if process is None:
            return
        assert process.stdin is not None
        with suppress(ConnectionError):
            process.stdin.write(b"drain\n")
        try:
            with suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), timeout_s)
        finally:
            self.kill()
            await process.wait()
            process.stdin.close()

    def kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
