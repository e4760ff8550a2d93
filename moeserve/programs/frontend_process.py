"""One more frontend on the port of a service: `python -m moeserve.programs.frontend_process`, with a line of JSON on stdin.

On stdout it says, in a line of JSON, that it is ready, or why it cannot be. After a line on stdin it drains. When stdin ends, so has the
process that started it, and this one does at once.
"""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from moeserve.config import load_server
from moeserve.errors import MoEServeError
from moeserve.programs import process
from moeserve.programs.frontend import FrontendProgram
from moeserve.programs.grpc_orders import GrpcOrders
from moeserve.server.proxy import SharedPort
from moeserve.server.security import FrontendTokens

log = logging.getLogger(__name__)


def main() -> None:
    """Until it is told to end."""
    # Unbuffered: a thread that waits in a buffered read when Python ends is a fatal error.
    stdin = io.FileIO(0, closefd=False)
    # What anything else prints, as a package with a family of its own, would be taken for an answer, and nobody reads it later.
    stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    told = json.loads(stdin.readline() or "null")
    if told is None:
        return
    logging.basicConfig(level=told["log_level"], format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    process.prepare()
    asyncio.run(_serve(told, stdin, stdout))


async def _serve(told: Mapping[str, Any], stdin: io.FileIO, stdout: TextIO) -> None:
    drain = asyncio.Event()
    threading.Thread(target=_listen, args=(stdin, asyncio.get_running_loop(), drain), name="stdin", daemon=True).start()
    file = None if told["token_file"] is None else Path(told["token_file"])
    tokens = FrontendTokens(file, frozenset({told["token"].encode()}), is_private=file is None)
    orders = GrpcOrders(told["controller"], told["token"])
    shared = SharedPort(told["controller"], tokens)
    asked = asyncio.create_task(drain.wait())
    try:
        program = FrontendProgram(load_server(told["server"]), orders, name=told["name"], node=told["node"], shared=shared)
        starting = asyncio.create_task(program.start())
        started: set[asyncio.Future[Any]] = {starting, asked}
        await asyncio.wait(started, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
            await asyncio.wait({starting})
            return
        starting.result()
    except MoEServeError as error:
        _say(stdout, error=str(error))
        return
    _say(stdout)
    ends: set[asyncio.Future[Any]] = {asked, program.broken}
    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    if program.broken.done():
        log.error("%s ends: %s", told["name"], program.broken.result())
    await program.stop()


def _listen(stdin: io.FileIO, loop: asyncio.AbstractEventLoop, drain: asyncio.Event) -> None:
    while stdin.readline():
        loop.call_soon_threadsafe(drain.set)
    os._exit(1)


def _say(stdout: TextIO, **what: str) -> None:
    print(json.dumps(what), file=stdout, flush=True)


if __name__ == "__main__":
    main()
