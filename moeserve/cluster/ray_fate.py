"""Why a host's process has ended, according to Ray, the kernel and the end of its log."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from moeserve.checkpoints import MemoryGroup, ServedLayers, host_bytes
from moeserve.cluster.ray_internals import exit_detail, find_actor, log_dir
from moeserve.cluster.timing import ASK_TIMEOUT_S
from moeserve.config import ServedModel
from moeserve.control import Assignment
from moeserve.errors import MoEServeError, number_of
from moeserve.release import Release

log = logging.getLogger(__name__)

_LOG_LINES: Final = 3
_MAX_CHARS: Final = 400


@dataclass(frozen=True)
class Fate:
    """How often Ray has started the process again; whether the actor is up, and its node lives; ids of its processes, the latest last."""

    restarts: int
    is_up: bool
    is_node_live: bool
    workers: Sequence[bytes] = ()


def fate_of(actor_id: ray.ActorID | None, node: str) -> Fate:
    """Blocks as long as Ray does. A reservation that is lost with its node never comes back."""
    is_node_live = any(each["Alive"] and each["NodeID"] == node for each in ray.nodes())
    found = None if actor_id is None else find_actor(actor_id)
    if found is None:
        return Fate(0, False, is_node_live)
    return Fate(found.restarts, found.is_alive, is_node_live, found.worker_ids)


class PostMortem:
    """Why processes of hosts end. Make it before the first one ends: kernel counts start then."""

    def __init__(self, model: ServedModel) -> None:
        self._model = model
        self._kills_before = MemoryGroup().oom_kills

    def findings(self, assignment: Assignment, release: Callable[[], Release], fate: Fate) -> str:
        """Why the latest process there has ended, in a few sentences; `release` is the release it was to serve. Blocks for seconds."""
        said, worker_id = "", b""
        for worker_id in reversed(fate.workers):
            if said := _exit_of(worker_id):
                break
        found = _found_on(assignment.node, worker_id.hex(), self._kills_before)
        return " ".join(part for part in (self._burden(release(), assignment.number), said, *found) if part)

    def _burden(self, release: Release, number: int) -> str:
        with suppress(MoEServeError):  # the files may be gone
            nbytes = host_bytes(release.sources(ServedLayers.read(self._model)), release.placement)[number]
            return f"It was to hold {nbytes / 2**20:.1f} MiB of weights."
        return ""


def _exit_of(worker_id: bytes) -> str:
    """Ray's reason for the end of a process; "" while it lives."""
    detail = " ".join(exit_detail(worker_id).splitlines()[:2])
    return f"Ray says: {_sentence(detail)}" if detail else ""


def _found_on(node: str, worker_id: str, kills_before: int) -> list[str]:
    """The findings of `_found_here` on that node; "" if it does not answer."""
    if node == ray.get_runtime_context().get_node_id():
        return _found_here(worker_id, kills_before)
    asked: Any = _found_there.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(worker_id)
    with suppress(RayError):
        found: list[str] = ray.get(asked, timeout=ASK_TIMEOUT_S)
        return found
    return []


@ray.remote(num_cpus=0)
def _found_there(worker_id: str) -> list[str]:
    return _found_here(worker_id, 0)


def _found_here(worker_id: str, kills_before: int) -> list[str]:
    """The kernel's counts, and the end of the process's log."""
    group, found = MemoryGroup(), []
    kills, limit_bytes = group.oom_kills - kills_before, group.limit_bytes
    if kills > 0:
        limit = "" if limit_bytes is None else f", which may use {limit_bytes / 2**20:.0f} MiB,"
        found.append(f"The kernel has killed {number_of(kills, 'process')} of its memory control group{limit} for want of memory.")
    if lines := _log_end(worker_id):
        found.append(f"Its log ends: {_sentence(lines)}")
    return found


def _log_end(worker_id: str) -> str:
    folder = log_dir()
    if folder is None or not worker_id:
        return ""
    for path in folder.glob(f"worker-{worker_id}-*.err"):
        lines = [line.strip() for line in path.read_text(errors="replace").splitlines()]
        return " / ".join([line for line in lines if line and not line.startswith(":")][-_LOG_LINES:])
    return ""


def _sentence(text: str) -> str:
    text = text.strip().rstrip(".")
    return f"{text if len(text) <= _MAX_CHARS else text[:_MAX_CHARS] + '…'}."
