"""Ending hosts for good, in any state."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from moeserve.cluster.folders import SocketFolder, remove_abandoned
from moeserve.cluster.ray_expert_host import ExpertHost
from moeserve.cluster.ray_internals import actor_id, draining_nodes, find_actor
from moeserve.cluster.ray_where import this_node
from moeserve.cluster.timing import END_LOOK_S, STOP_TIMEOUT_S
from moeserve.loops import in_thread


async def end_hosts(actors: Sequence[ActorHandle[ExpertHost]], sockets: SocketFolder) -> None:
    """Each finishes the pass that is running; a host that does not answer is killed on its node, because Ray gets no answer, either.

    Returns when those on this node have ended, not only when Ray has been told.
    """
    stops: list[Any] = [actor.stop.remote() for actor in actors]
    if stops:
        stopped, _ = await in_thread(partial(ray.wait, stops, num_returns=len(stops), timeout=STOP_TIMEOUT_S))
        hanging = [actor for actor, stop in zip(actors, stops, strict=True) if stop not in stopped]
        processes, hung = await in_thread(_processes_of, actors), await in_thread(_processes_of, hanging)
        for actor in actors:
            ray.kill(actor)
        await in_thread(_end_processes, hung, sockets)
        await in_thread(_await_ends, [pid for node, pid in processes if node == this_node()])


async def kill_processes(actors: Sequence[ActorHandle[ExpertHost]], sockets: SocketFolder) -> None:
    """End the processes of hosts that hang; Ray starts others in their place."""
    await in_thread(lambda: _end_processes(_processes_of(actors), sockets))


def _processes_of(actors: Sequence[ActorHandle[ExpertHost]]) -> list[tuple[str, int]]:
    """Node and process id of each host on a node that can still start processes."""
    usable = {node["NodeID"] for node in ray.nodes() if node["Alive"]} - draining_nodes()
    found = [find_actor(actor_id(actor)) for actor in actors]
    return [(record.node_id, record.pid) for record in found if record is not None and record.node_id in usable]


def _end_processes(processes: Sequence[tuple[str, int]], sockets: SocketFolder) -> None:
    for node, pid in processes:
        if node == this_node():  # at once: the task below may wait for a new process
            with suppress(PermissionError):
                _kill(pid)
    ends = [
        _end_process.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(pid, sockets)
        for node, pid in processes
    ]
    if ends:
        ray.wait(ends, num_returns=len(ends), timeout=STOP_TIMEOUT_S)


@ray.remote(num_cpus=0)
def _end_process(pid: int, sockets: SocketFolder) -> None:
    _kill(pid)
    folder = sockets.path()
    for left_behind in folder.glob(f"host-*-{pid}.sock"):
        left_behind.unlink(missing_ok=True)
    remove_abandoned(folder)


def _kill(pid: int) -> None:
    """Unless it is no host any more."""
    command = Path(f"/proc/{pid}/cmdline")
    with suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
        if b"ExpertHost" in command.read_bytes():
            os.kill(pid, signal.SIGKILL)
            _await_ends([pid])


def _await_ends(pids: Sequence[int]) -> None:
    """Waits until these hosts have closed their files; then their command lines are empty, gone, or another program's."""
    deadline = time.monotonic() + STOP_TIMEOUT_S
    for pid in pids:
        with suppress(FileNotFoundError, ProcessLookupError):
            while b"ExpertHost" in Path(f"/proc/{pid}/cmdline").read_bytes() and time.monotonic() < deadline:
                time.sleep(END_LOOK_S)
