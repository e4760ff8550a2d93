"""The first state of a service, and waiting for nodes that its hosts fit on."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from moeserve.control import timing
from moeserve.control.assignments import Assigned, Node, Wanted
from moeserve.control.desired import Planner
from moeserve.control.reconcile import reconcile
from moeserve.control.state import State
from moeserve.errors import ConfigError
from moeserve.loops import in_thread
from moeserve.release import Release

log = logging.getLogger(__name__)


class Nodes(Protocol):
    """The cluster's nodes."""

    async def list(self) -> list[Node]:
        """The live nodes."""
        ...

    def ask_for(self, wanted: Wanted, num_hosts: int) -> None:
        """Ask the cluster's autoscaler, if there is one, to keep nodes for so many hosts; 0 = no request."""
        ...


async def first_state(planner: Planner, nodes: Nodes) -> State:
    """The first state of a new service. Raises ConfigError when its hosts do not fit on the nodes, after placement.wait_for_nodes_s.

    Its weights are the files of the planner's layers as they are now.
    """
    num_hosts = planner.first_num_hosts()
    wanted, wait_s = planner.wanted(num_hosts), planner.placing.wait_for_nodes_s
    try:
        assigned = await until_assigned(lambda known: reconcile(known, (), wanted, 0), wanted, nodes, wait_s)
    except BaseException:
        if wait_s:
            nodes.ask_for(wanted, 0)
        raise
    release = await in_thread(Release.first, planner.plan(len(assigned.assignments)), planner.layers.sources)
    return State(release, assigned.assignments, num_hosts, release.epoch, len(assigned.assignments))


async def until_assigned(assignment: Callable[[Sequence[Node]], Assigned], wanted: Wanted, nodes: Nodes, wait_s: float) -> Assigned:
    """`assignment` of the nodes, when there is no shortage. Raises ConfigError when there still is one after `wait_s`.

    Meanwhile the cluster's autoscaler is asked for missing nodes.
    """
    deadline, said = time.monotonic() + max(wait_s, timing.STALE_S), None
    while (assigned := assignment(known := await nodes.list())).shortage is not None:
        if wait_s:
            nodes.ask_for(wanted, wanted.least if wanted.num_hosts == "all" else wanted.num_hosts)
        is_hopeless = assignment([replace(node, free=node.total) for node in known]).shortage is not None
        if time.monotonic() > deadline or (is_hopeless and not wait_s):
            raise ConfigError(assigned.shortage)
        if wait_s and assigned.shortage != said:
            log.info("waiting for nodes: %s", assigned.shortage)
        said = assigned.shortage
        await asyncio.sleep(timing.ROOM_RETRY_S)
    return assigned
