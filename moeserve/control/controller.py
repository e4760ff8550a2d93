"""Keeps the hosts as they shall be: changes that somebody asks for, and those that nodes and hosts force by coming and going."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from moeserve.checkpoints import Swap
from moeserve.control import timing
from moeserve.control.assignments import Assigned, Node, Wanted
from moeserve.control.desired import Planner
from moeserve.control.frontends import Frontends
from moeserve.control.reconcile import reconcile
from moeserve.control.rollout import Hosts, Rollout
from moeserve.control.state import NumHosts, State
from moeserve.control.status import status_of
from moeserve.errors import ConfigError, MoEServeError
from moeserve.log_limit import limited_logger
from moeserve.observe.stats import HostInfo, host_name
from moeserve.observe.status import ServiceStatus
from moeserve.release import Release

log = logging.getLogger(__name__)
strangers = limited_logger(__name__)


class Nodes(Protocol):
    """The cluster's nodes."""

    async def list(self) -> list[Node]:
        """Those that live."""
        ...

    def ask_for(self, wanted: Wanted, num_hosts: int) -> None:
        """Have the cluster's autoscaler, if there is one, keep nodes for so many hosts; 0 = as it likes."""
        ...


class HostFleet(Hosts, Protocol):
    """All hosts."""

    @property
    def given_up(self) -> Collection[int]:
        """Hosts that Ray will not bring back."""
        ...

    @property
    def failing(self) -> Mapping[int, str]:
        """Hosts that are not on their way back at present, and why."""
        ...

    @property
    def present(self) -> Mapping[int, HostInfo]:
        """What hosts that are up have said of themselves."""
        ...


def _tell_of_failure(change: asyncio.Task[Release]) -> None:
    """Of a change whose caller has hung up."""
    if not change.cancelled() and (error := change.exception()) is not None:
        strangers.warning("a change that nobody waits for any more could not be made: %s", error)


async def first_state(planner: Planner, nodes: Nodes) -> State:
    """Where the hosts of a new service go. Raises ConfigError when the nodes do not hold them, after placement.wait_for_nodes_s.

    It is made of the files that the planner's layers are in now.
    """
    num_hosts = planner.first_num_hosts()
    wanted, wait_s = planner.wanted(num_hosts), planner.placing.wait_for_nodes_s
    try:
        assigned = await _until_assigned(lambda known: reconcile(known, (), wanted, 0), wanted, nodes, wait_s)
    except BaseException:
        if wait_s:
            nodes.ask_for(wanted, 0)
        raise
    release = await asyncio.to_thread(Release.first, planner.plan(len(assigned.assignments)), planner.layers.sources)
    return State(release, assigned.assignments, num_hosts, release.epoch, len(assigned.assignments))


async def _until_assigned(assignment: Callable[[Sequence[Node]], Assigned], wanted: Wanted, nodes: Nodes, wait_s: float) -> Assigned:
    """What `assignment` makes of the nodes, once nothing is short. Raises ConfigError when it still is after `wait_s`.

    Meanwhile the cluster's autoscaler is asked for what is missing.
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


class Controller:
    """One change at a time, and each to its end, even if whoever asked for it hangs up. `save` is given what a successor must know."""

    def __init__(
        self,
        planner: Planner,
        state: State,
        nodes: Nodes,
        hosts: HostFleet,
        frontends: Frontends,
        save: Callable[[State], None],
    ) -> None:
        #: set when somebody who may has asked for the service to end
        self.stop_requested = asyncio.Event()
        self._planner = planner
        self._frontends = frontends
        self._nodes = nodes
        self._hosts = hosts
        self._rollout = Rollout(planner, state, hosts, frontends, save)
        self._one_at_a_time = asyncio.Lock()
        self._changes: set[asyncio.Task[Release]] = set()
        self._wanted_now: Wanted | None = None
        self._shortage: str | None = None
        #: why hosts that will not come back have not been replaced
        self._why_as_it_is: str | None = None

    @property
    def state(self) -> State:
        """What is served, and what was asked for."""
        return self._rollout.state

    def status(self) -> ServiceStatus:
        """What is deployed and where, for people."""
        names = [spec.name for spec in self._planner.layers.specs]
        present, frontends = self._hosts.present, self._frontends.members()
        short = " ".join(dict.fromkeys((*([self._shortage] if self._shortage else []), *self._failing().values())))
        return status_of(self.state, self._rollout.is_under_way, short, names, present, frontends)

    def ask_to_stop(self) -> None:
        """Whoever runs the service is told by `stop_requested`."""
        self.stop_requested.set()

    async def swap(self, layer: str, checkpoint: Path, experts: Sequence[int] | None = None) -> Release:
        """Serve a layer ("" = every layer), or some of its experts, with the weights of another folder of the same model.

        It may be the folder that is served, when its files are others now. Files are read on the hosts: `checkpoint` must be there, and
        here. Raises UnknownLayer, ConfigError or CheckpointError; then everything is as it was.
        """
        if not layer and experts is not None:
            raise ConfigError("experts are those of one layer: name it")
        layers = [layer] if layer else [spec.name for spec in self._planner.layers.specs]
        swaps = [Swap(name, checkpoint, None if experts is None else frozenset(experts)) for name in layers]
        return await self._to_its_end(self._change(lambda: self._rollout.swap(swaps)))

    async def scale(self, num_hosts: NumHosts) -> Release:
        """Spread the experts over so many hosts, or over all that the nodes hold.

        New ones start, or some leave. Raises ConfigError when they cannot be had; then everything is as it was.
        """
        return await self._to_its_end(self._scale(num_hosts))

    async def drain(self, host: str) -> Release:
        """Place the experts of a host on the others, and let it go; there shall be one fewer from now on.

        Raises ConfigError when there is no such host, or no room.
        """
        return await self._to_its_end(self._change(lambda: self._drain(host)))

    async def begin(self, work: Awaitable[None]) -> None:
        """Bring up the hosts of the first state by `work`; whoever asks for a change meanwhile waits."""
        async with self._one_at_a_time:
            await work

    async def end(self) -> None:
        """Nobody needs the nodes any more: an autoscaler may take those away that it has brought."""
        if self._planner.placing.wait_for_nodes_s:
            self._nodes.ask_for(await self._wanted(), 0)

    async def keep(self) -> None:
        """Follow the nodes and the hosts, until cancelled: what is lost is replaced or placed on the rest, what joins is used.

        Frontends are told of hosts that nobody should wait for.
        """
        await asyncio.gather(self._keep_following(), self._keep_telling())

    async def _keep_telling(self) -> None:
        while True:
            self._frontends.set_failing(self._failing())
            await asyncio.sleep(timing.CONTROL_LOOK_S)

    def _failing(self) -> dict[int, str]:
        """By number of the host; those that are to be replaced are on their way, until that turns out to be impossible."""
        why = self._why_as_it_is
        gone = [assignment.number for assignment in self.state.assignments if assignment.number in self._hosts.given_up]
        return {**self._hosts.failing, **(dict.fromkeys(gone, f"its node is gone, and {why}") if why else {})}

    async def _keep_following(self) -> None:
        pause_s = timing.CONTROL_LOOK_S
        while True:
            await asyncio.sleep(pause_s)
            try:
                await self._to_its_end(self._change(self._follow))
                pause_s, self._why_as_it_is = timing.CONTROL_LOOK_S, self._shortage
            except Exception as error:  # whatever it is, of Ray for example, it must not be the last try
                pause_s, self._why_as_it_is = min(2 * pause_s, timing.LONGEST_PAUSE_S), str(error)
                is_known = isinstance(error, MoEServeError)
                log.warning("hosts cannot follow the nodes: %r; next try in %g s", error, pause_s, exc_info=not is_known)

    async def _to_its_end(self, change: Coroutine[Any, Any, Release]) -> Release:
        """A caller who hangs up does not leave a change half made."""
        task = asyncio.ensure_future(change)
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(_tell_of_failure)
            raise

    async def _change(self, change: Callable[[], Coroutine[Any, Any, Release]]) -> Release:
        async with self._one_at_a_time:
            return await change()

    async def _scale(self, num_hosts: NumHosts) -> Release:
        if num_hosts != "all" and num_hosts < 1:
            raise ConfigError("at least one host is needed")
        wanted = await asyncio.to_thread(self._planner.wanted, num_hosts)
        try:
            # Nodes may be minutes away: meanwhile those that there are are followed.
            await _until_assigned(lambda nodes: self._assigned(nodes, wanted), wanted, self._nodes, self._planner.placing.wait_for_nodes_s)
            return await self._change(lambda: self._reach(num_hosts, wanted))
        finally:
            self._ask_for(await self._wanted())

    async def _reach(self, num_hosts: NumHosts, wanted: Wanted) -> Release:
        assigned = self._assigned(await self._nodes.list(), wanted)
        if assigned.shortage is not None:
            raise ConfigError(assigned.shortage)
        return await self._rollout.move(assigned.assignments, num_hosts)

    async def _drain(self, host: str) -> Release:
        assignments = self.state.assignments
        left = tuple(assignment for assignment in assignments if host_name(assignment.number) != host)
        if len(left) == len(assignments):
            raise ConfigError(
                f"there is no host {host!r}; there are {', '.join(host_name(assignment.number) for assignment in assignments)}"
            )
        if not left:
            raise ConfigError(f"{host} is the only host: at least one is needed")
        release = await self._rollout.move(left, len(left))
        self._ask_for(await self._wanted())
        return release

    async def _follow(self) -> Release:
        wanted = await self._wanted()
        assigned = self._assigned(await self._nodes.list(), wanted)
        if assigned.shortage != self._shortage:
            self._shortage = assigned.shortage
            log.warning("%s", assigned.shortage or "nothing is short any more")
            self._ask_for(wanted)
        return await self._rollout.move(assigned.assignments, self.state.num_hosts)

    async def _wanted(self) -> Wanted:
        if self._wanted_now is None or self._wanted_now.num_hosts != self.state.num_hosts:
            self._wanted_now = await asyncio.to_thread(self._planner.wanted, self.state.num_hosts)
        return self._wanted_now

    def _assigned(self, nodes: Sequence[Node], wanted: Wanted) -> Assigned:
        return reconcile(nodes, self.state.assignments, wanted, self.state.next_number, self._hosts.given_up)

    def _ask_for(self, wanted: Wanted) -> None:
        """Where nodes are waited for there is an autoscaler, which shall keep those that are needed and no more."""
        if self._planner.placing.wait_for_nodes_s:
            self._nodes.ask_for(wanted, 0 if wanted.num_hosts == "all" else wanted.num_hosts)
