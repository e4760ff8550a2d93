"""Losses after which hosts cannot be restarted: processes and folders of the Ray that this process has started."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Coroutine
from typing import Any

from moeserve.cluster.cluster import Loss
from moeserve.cluster.ray_internals import GCS, RAYLET, session_dir, started_processes
from moeserve.cluster.timing import LOSS_LOOK_S

log = logging.getLogger(__name__)


def find_loss() -> Loss | None:
    """The missing part of the Ray that this process has started; None = nothing is missing."""
    session = session_dir()
    if session is None:
        return Loss("this process is not connected to Ray any more", is_final=True)
    started = started_processes()
    for kind in (GCS, RAYLET):
        for process in started.get(kind, ()):
            if process.poll() is not None:
                return Loss(f"a process of Ray has ended: {kind}, pid {process.pid}", is_final=kind == GCS)
            if _folder_of(process.pid).endswith(" (deleted)"):
                return Loss("the folder that Ray was started in has been removed, and Ray starts no process without it", is_final=False)
    return None if session.is_dir() else Loss(f"the folder of Ray, {session}, has been removed", is_final=False)


async def until_lost() -> Loss:
    """Waits until a part is missing."""
    while True:
        if (loss := find_loss()) is not None:
            return loss
        await asyncio.sleep(LOSS_LOOK_S)


async def unless_lost(ending: Coroutine[Any, Any, None], timeout_s: float) -> None:
    """End hosts, unless a part of Ray is missing or Ray does not answer: it would not for a minute, and then end this process."""
    working, losing = asyncio.create_task(ending), asyncio.create_task(until_lost())
    try:
        await asyncio.wait({working, losing}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
        else:
            log.warning("Ray does not answer any more: hosts are left to it")
    finally:
        for task in (working, losing):
            task.cancel()
        await asyncio.gather(working, losing, return_exceptions=True)


def _folder_of(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/cwd")
    except OSError:
        return ""
