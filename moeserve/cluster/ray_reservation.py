"""A reservation for one host on one node, kept when its process dies: a Ray placement group of one bundle.

The service chooses the node; Ray would restart a host on any node. When the node dies, the reservation is lost.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Collection, Sequence
from contextlib import suppress

import ray
from ray.util import get_placement_group, placement_group, placement_group_table, remove_placement_group
from ray.util.placement_group import PlacementGroup

from moeserve.cluster.timing import GRANT_TIMEOUT_S, RETRY_S
from moeserve.config import PlacementConfig
from moeserve.control import Assignment
from moeserve.errors import ConfigError
from moeserve.observe.stats import host_name

_HOST_NAME = re.compile(r"host-(\d+)")


class _Expected(logging.Filter):
    """Ray warns that removing a group kills its actor for good, which is what removing it is for."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("Scheduling a restartable detached actor with a placement group")


logging.getLogger("ray.actor").addFilter(_Expected())


def host_number(name: str) -> int | None:
    """None if it is not the name of a host."""
    found = _HOST_NAME.fullmatch(name)
    return int(found[1]) if found else None


async def reserve_all(assignments: Sequence[Assignment], placement: PlacementConfig, *, detached: bool) -> list[PlacementGroup]:
    """A host's resources on the node of each. Raises ConfigError, and keeps none, if one is not granted within seconds."""
    groups = [_reserve(each, placement, detached=detached) for each in assignments]
    try:
        late = [each for each, is_granted in zip(assignments, await _await_granted(groups), strict=True) if not is_granted]
        if late:
            where = ", ".join(f"{host_name(each.number)} on {each.node}" for each in late)
            raise ConfigError(f"there is no room any more for {where}: another program has taken it, or the node is gone")
    except BaseException:  # who is cancelled is about to end, and what it has asked for may outlive it
        for group in groups:
            give_back(group)
        raise
    return groups


def _reserve(assignment: Assignment, placement: PlacementConfig, *, detached: bool) -> PlacementGroup:
    amounts = {"CPU": placement.cpus_per_host, "GPU": placement.gpus_per_host}
    bundle = {resource: amount for resource, amount in amounts.items() if amount} or {"memory": 1}  # an empty one is refused; 1 byte
    where = {"ray.io/node-id": assignment.node, **placement.node_labels}
    name, lifetime = (host_name(assignment.number), "detached") if detached else ("", None)
    group: PlacementGroup = placement_group([bundle], strategy="STRICT_PACK", bundle_label_selector=[where], name=name, lifetime=lifetime)
    return group


async def _await_granted(groups: Sequence[PlacementGroup]) -> list[bool]:
    """The reservations that were granted within a few seconds."""
    waiting = [asyncio.wrap_future(group.ready().future()) for group in groups]
    if waiting:
        await asyncio.wait(waiting, timeout=GRANT_TIMEOUT_S)
    granted = [future.done() and future.exception() is None for future in waiting]
    for future in waiting:
        future.cancel()
    return granted


def give_back(group: PlacementGroup) -> None:
    """Kills processes that still run there."""
    remove_placement_group(group)


def find_reservations() -> dict[int, PlacementGroup]:
    """The reservations of detached hosts in this process's Ray namespace, by number of the host."""
    names = {entry["name"] for entry in placement_group_table().values() if entry["state"] != "REMOVED"}
    found = {}
    for name in names:
        if (number := host_number(name)) is not None:
            with suppress(ValueError):  # it is in another namespace
                found[number] = get_placement_group(name)
    return found


def find_hosts() -> set[int]:
    """Numbers of the detached hosts in this process's Ray namespace that live, or that Ray is about to restart."""
    numbers = {host_number(name) for name in ray.util.list_named_actors()}
    return {number for number in numbers if number is not None}


async def await_forgotten(numbers: Collection[int], timeout_s: float) -> None:
    """Waits until Ray has forgotten these hosts, so that their names are free."""
    for _ in range(int(timeout_s / RETRY_S)):
        if (find_hosts() | find_reservations().keys()).isdisjoint(numbers):
            return
        await asyncio.sleep(RETRY_S)
