"""Cleaning up a deployed service whose controller was killed and will not come back."""

from __future__ import annotations

import asyncio
import re
from typing import Final

from moeserve.cluster.ray_program import ProgramActor
from moeserve.cluster.ray_reservation import find_reservations, give_back
from moeserve.cluster.ray_store import RayStore

_OURS: Final = re.compile(r"controller|(?:frontend|host)-\d+")


async def sweep(namespace: str) -> None:
    """End controller, frontends and hosts of this process' Ray namespace, release the hosts' reservations, and delete the stored state."""
    await asyncio.to_thread(_sweep, namespace)


def _sweep(namespace: str) -> None:
    RayStore(namespace).clear()
    for actor in ProgramActor.find_all(namespace):
        if _OURS.fullmatch(actor.name):
            actor.kill()
    for group in find_reservations().values():
        give_back(group)
