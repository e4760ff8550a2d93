"""What this machine must have for hosts to come back: processes and folders of the Ray that this process has started."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Final

from ray._private import worker

from moeserve.cluster.cluster import Loss

_LOOK_S: Final = 1.0


def find_loss() -> Loss | None:
    """What is missing of the Ray that this process is connected to, as far as it has started it itself."""
    node = worker._global_node
    if node is None:
        return Loss("this process is not connected to Ray any more", is_final=True)
    for name in ("gcs_server", "raylet"):
        for started in node.all_processes.get(name, ()):
            if started.process.poll() is not None:
                return Loss(f"a process of Ray has ended: {name}, pid {started.process.pid}", is_final=name == "gcs_server")
            if _folder_of(started.process.pid).endswith(" (deleted)"):
                return Loss("the folder that Ray was started in has been removed, and Ray starts no process without it", is_final=False)
    session = Path(node.get_session_dir_path())
    return None if session.is_dir() else Loss(f"the folder of Ray, {session}, has been removed", is_final=False)


async def until_lost() -> Loss:
    """Until something is missing."""
    while True:
        if (loss := find_loss()) is not None:
            return loss
        await asyncio.sleep(_LOOK_S)


def _folder_of(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/cwd")
    except OSError:
        return ""
