"""Which hosts the desired state gives on the nodes as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from moeserve.config import Copies
from moeserve.control.assignments import Assigned, Node, Wanted
from moeserve.control.desired import Planner
from moeserve.control.first_state import Nodes
from moeserve.control.fleet import HostFleet
from moeserve.control.reconcile import reconcile
from moeserve.control.state import NumHosts, State
from moeserve.loops import in_thread


class Assigner:
    """Applies `reconcile` to the present state, which `state` returns; with wait_for_nodes_s, asks for the nodes that it needs."""

    def __init__(self, planner: Planner, nodes: Nodes, hosts: HostFleet, state: Callable[[], State]) -> None:
        self._planner, self._nodes, self._hosts, self._state = planner, nodes, hosts, state
        #: and the number of hosts and the copies that it is for
        self._wanted_now: tuple[Wanted, NumHosts, Copies | None] | None = None

    async def wanted(self) -> Wanted:
        """The desired state."""
        asked = self._state().num_hosts, self._state().copies
        if self._wanted_now is None or self._wanted_now[1:] != asked:
            self._wanted_now = await in_thread(self._planner.with_copies(asked[1]).kept, asked[0]), *asked
        return self._wanted_now[0]

    def assigned(self, nodes: Sequence[Node], wanted: Wanted) -> Assigned:
        """From the present assignments."""
        state = self._state()
        return reconcile(nodes, state.assignments, wanted, state.next_number, self._hosts.given_up)

    def ask_for(self, wanted: Wanted) -> None:
        """With wait_for_nodes_s there is an autoscaler: ask it for the nodes that are needed, and no more."""
        if self._planner.placing.wait_for_nodes_s:
            self._nodes.ask_for(wanted, 0 if wanted.num_hosts == "all" else wanted.num_hosts)

    async def ask_for_none(self) -> None:
        """The nodes are not needed any more: an autoscaler may remove the ones it added."""
        if self._planner.placing.wait_for_nodes_s:
            self._nodes.ask_for(await self.wanted(), 0)
