"""Drives hosts to the desired state: changes by administrators, and changes that nodes and hosts cause by joining and leaving."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from moeserve.api.find_layer import find_layer
from moeserve.checkpoints import Swap
from moeserve.control import timing
from moeserve.control.assigner import Assigner
from moeserve.control.assignments import Assignment, Wanted
from moeserve.control.audit import AuditLog, Begun, BroughtIn, ChangeWithdrawn
from moeserve.control.autoscaler import Autoscaler
from moeserve.control.balancer import Balancer
from moeserve.control.causes import cause_of
from moeserve.control.change_queue import ChangeQueue
from moeserve.control.changes import cost_of, moved, swapped, with_copies
from moeserve.control.copies import changed_copies
from moeserve.control.desired import Planner
from moeserve.control.first_state import Nodes, until_assigned
from moeserve.control.fleet import HostFleet
from moeserve.control.frontends import Frontends
from moeserve.control.restarts import Restarts
from moeserve.control.rollout import Rollout
from moeserve.control.room import require_room
from moeserve.control.stall import UNREADABLE, unless_stalled
from moeserve.control.state import NumHosts, State
from moeserve.control.status import layers_of, status_of
from moeserve.control.thinning import Change, in_steps
from moeserve.errors import ConfigError, MoEServeError, number_of
from moeserve.loops import in_thread
from moeserve.observe.audit import ADMINISTRATOR
from moeserve.observe.stats import host_name
from moeserve.observe.status import Rebalanced, ServiceStatus
from moeserve.placement import Transition
from moeserve.release import Release

log = logging.getLogger(__name__)


class Controller:
    """Makes one change at a time, each to its end, even if its caller leaves. `save` receives the state for the next incarnation."""

    def __init__(
        self,
        planner: Planner,
        state: State,
        nodes: Nodes,
        hosts: HostFleet,
        frontends: Frontends,
        save: Callable[[State], None],
    ) -> None:
        #: set when an administrator has asked for the service to end
        self.stop_requested = asyncio.Event()
        self._planner = planner
        self._frontends = frontends
        self._nodes = nodes
        self._hosts = hosts
        self._rollout = Rollout(state, hosts, frontends, save, planner.placing.load_timeout_s)
        self._queue = ChangeQueue()
        #: what was changed
        self.audit = AuditLog(lambda: self.state.release.epoch)
        self._balancer = Balancer(planner, self, frontends, self.audit)
        self._restarts = Restarts(self.audit)
        self._autoscaler = Autoscaler(planner, self, nodes, hosts, frontends)
        self._assigner = Assigner(planner, nodes, hosts, lambda: self.state)
        self._shortage: str | None = None
        self._missing = 0
        #: why lost hosts have not been replaced
        self._why_as_it_is: str | None = None

    @property
    def state(self) -> State:
        """What is served, and the desired number of hosts."""
        return self._rollout.state

    @property
    def down(self) -> list[str]:
        """Names of the hosts that are down."""
        present = self._hosts.present
        return [host_name(assignment.number) for assignment in self.state.assignments if assignment.number not in present]

    def status(self) -> ServiceStatus:
        """Hosts, frontends and layers, as `moeserve status` shows them."""
        names = [spec.name for spec in self._planner.layers.specs]
        present, frontends = self._hosts.present, self._frontends.members()
        short = " ".join(dict.fromkeys((*([self._shortage] if self._shortage else []), *self._failing().values())))
        layers = layers_of(self.state.release, names, self._balancer.load())
        return status_of(self.state, self._rollout.changing, short, layers, present, frontends)

    def ask_to_stop(self) -> None:
        """Sets `stop_requested`, which the process of the service watches."""
        self.stop_requested.set()

    def layer_name(self, layer: int) -> str:
        """The name of a served layer, by its position. Raises UnknownLayer."""
        names = [spec.name for spec in self._planner.layers.specs]
        return names[find_layer(names, layer)]

    async def swap(self, layer: str, checkpoint: Path, experts: Sequence[int] | None = None) -> Release:
        """Serve a layer ("" = every layer), or some of its experts, with the weights of another folder of the same model.

        It may be the served folder, if its files have changed. Hosts read the files: `checkpoint` must exist there, and
        here. Raises UnknownLayer, ConfigError or CheckpointError; then nothing has changed.
        """
        layers = [layer] if layer else [spec.name for spec in self._planner.layers.specs]
        swaps = [Swap(name, checkpoint, None if experts is None else frozenset(experts)) for name in layers]

        def change(state: State) -> State:
            if not layer and experts is not None:
                raise ConfigError("experts need a layer: name the layer of these experts")
            return swapped(state, swaps, self._planner)

        why = f"{checkpoint} could not be read"
        which = "" if experts is None else f"experts {', '.join(map(str, experts))} of "
        asked = Begun("swap", f"{which}{f'layer {layer}' if layer else 'every layer'} from {checkpoint}")
        return await self._asked(asked, lambda: self._brought_in(change, asked.kind, why))

    async def scale(self, num_hosts: NumHosts, why: str = ADMINISTRATOR, instead_of: int | None = None) -> Release:
        """Change the number of hosts; "all" = as many as fit on the nodes. `why`: who or what asks for it. Autoscaling goes on from there.

        `instead_of`: only if that is the desired number when its turn comes. Hosts start or leave. Raises ConfigError when they do not fit,
        autoscaling does not allow it, or it is no longer `instead_of`; then nothing has changed. Raises ChangeStopped when full hosts make
        it in steps, and a later one cannot be made.
        """

        async def change() -> BroughtIn:
            if why == ADMINISTRATOR and (refusal := self._planner.autoscaling.refusal(num_hosts)) is not None:
                raise ConfigError(refusal)
            return await self._scale(num_hosts, instead_of)

        asked = Begun("scale", f"to {'as many hosts as fit' if num_hosts == 'all' else number_of(num_hosts, 'host')}", why)
        return await self._queue.to_its_end(self.audit.recorded(asked, change))

    async def drain(self, host: str) -> Release:
        """Move the experts of a host to the others, then remove it; the desired number of hosts is one fewer from now on.

        Raises ConfigError when there is no such host, or no room, and ChangeStopped as `scale`.
        """
        return await self._asked(Begun("drain", host), lambda: self._drain(host))

    async def scale_copies(self, layer: str, expert: int | None, copies: int) -> Release:
        """So many copies of one expert, of every expert of a layer (None), or of all layers (""), in place of placement.copies.

        Raises UnknownLayer, or ConfigError when they do not fit; then nothing has changed. Raises ChangeStopped as `scale`.
        """

        def change(state: State) -> State:
            return with_copies(state, changed_copies(self._planner.with_copies(state.copies), layer, expert, copies), self._planner)

        whose = "every expert" if expert is None else f"expert {expert}"
        asked = Begun("copies", f"{copies} of {whose} of {f'layer {layer}' if layer else 'every layer'}")
        return await self._asked(asked, lambda: self._in_steps(change, asked.kind))

    async def rebalance(self, dry_run: bool = False) -> Rebalanced:
        """One round of balancing, or only its plan. Raises ExpertUnavailable while a host is down, ConfigError if it cannot be made."""
        return await self._queue.to_its_end(self._balancer.rebalance(dry_run=dry_run))

    async def bring_in(self, change: Change, what: str) -> Release:
        """A step of a round, in its turn; the round is what is recorded. Raises MoEServeError; then nothing has changed."""
        step = self._queue.in_turn(lambda: self._brought_in(change, what))
        return (await self._queue.to_its_end(step)).release

    async def follow(self) -> None:
        """Adapt the hosts to the nodes as they are now. Raises MoEServeError; then nothing has changed."""
        await self._queue.to_its_end(self._queue.in_turn(self._follow))

    async def begin(self, work: Awaitable[None], why: str) -> None:
        """Bring up the hosts of the first state by `work`; changes wait meanwhile."""

        async def brought_up() -> BroughtIn:
            await work
            self._restarts.look(self._hosts.present, self.state.assignments)
            return BroughtIn(self.state.release)

        asked = Begun("start", number_of(len(self.state.assignments), "host"), why)
        await self._queue.in_turn(lambda: self.audit.recorded(asked, brought_up))

    async def abandon(self) -> None:
        """The service is about to end: changes under way are withdrawn, as they may take for ever, and none is begun any more."""
        await self._queue.abandon()

    async def end(self) -> None:
        """The nodes are not needed any more: an autoscaler may remove the ones it added."""
        await self._assigner.ask_for_none()

    async def keep(self) -> None:
        """Reconcile until cancelled: lost hosts are replaced, or their experts placed on the rest; new nodes are used.

        Experts and hosts follow the load. Frontends are told which hosts are failing.
        """
        await asyncio.gather(self._keep_following(), self._keep_telling(), self._balancer.keep(), self._autoscaler.keep())

    async def _keep_telling(self) -> None:
        while True:
            self._frontends.set_failing(self._failing())
            self._frontends.set_wanted(*max((self.state.wanted_hosts, self._missing), self._autoscaler.wanted))
            self._restarts.look(self._hosts.present, self.state.assignments)
            await asyncio.sleep(timing.CONTROL_LOOK_S)

    def _failing(self) -> dict[int, str]:
        """Reasons by number of the host. A lost host counts as failing only when it cannot be replaced."""
        why = self._why_as_it_is
        gone = [assignment.number for assignment in self.state.assignments if assignment.number in self._hosts.given_up]
        return {**self._hosts.failing, **(dict.fromkeys(gone, f"its node is gone, and {why}") if why else {})}

    async def _keep_following(self) -> None:
        pause_s = timing.CONTROL_LOOK_S
        while not self._queue.is_ending:
            await asyncio.sleep(pause_s)
            try:
                await self.follow()
                pause_s, self._why_as_it_is = timing.CONTROL_LOOK_S, self._shortage
            except ChangeWithdrawn:  # the service is ending
                return
            except Exception as error:  # any error, of Ray for example: try again
                pause_s, self._why_as_it_is = min(2 * pause_s, timing.LONGEST_PAUSE_S), str(error)
                is_known = isinstance(error, MoEServeError)
                log.warning("cannot adapt hosts to the nodes: %r; next attempt in %g s", error, pause_s, exc_info=not is_known)

    async def _asked(self, begun: Begun, change: Callable[[], Awaitable[BroughtIn]]) -> Release:
        """A change in its turn; recorded, however it ends."""
        return await self._queue.to_its_end(self.audit.recorded(begun, lambda: self._queue.in_turn(change)))

    async def _scale(self, num_hosts: NumHosts, instead_of: int | None) -> BroughtIn:
        if num_hosts != "all" and num_hosts < 1:
            raise ConfigError(f"placement.num_hosts is {num_hosts}; allowed: at least 1, or 'all'")
        wanted = await in_thread(self._planner.with_copies(self.state.copies).wanted, num_hosts)
        try:
            # New nodes may take minutes: meanwhile the present ones are followed.
            await until_assigned(
                lambda nodes: self._assigner.assigned(nodes, wanted), wanted, self._nodes, self._planner.placing.wait_for_nodes_s
            )
            return await self._queue.in_turn(lambda: self._reach(num_hosts, wanted, instead_of))
        finally:
            self._assigner.ask_for(await self._assigner.wanted())

    async def _reach(self, num_hosts: NumHosts, wanted: Wanted, instead_of: int | None) -> BroughtIn:
        if instead_of is not None and instead_of != self.state.num_hosts:
            raise ConfigError(f"another number of hosts has been asked for meanwhile: {self.state.num_hosts} in place of {instead_of}")
        assigned = self._assigner.assigned(await self._nodes.list(), wanted)
        if assigned.shortage is not None:
            raise ConfigError(assigned.shortage)
        return await self._moved(assigned.assignments, num_hosts, "scale")

    async def _drain(self, host: str) -> BroughtIn:
        assignments = self.state.assignments
        left = tuple(assignment for assignment in assignments if host_name(assignment.number) != host)
        if len(left) == len(assignments):
            raise ConfigError(
                f"there is no host {host!r}; there are {', '.join(host_name(assignment.number) for assignment in assignments)}"
            )
        if not left:
            raise ConfigError(f"{host} is the only host; a service needs at least one")
        done = await self._moved(left, len(left), "drain")
        self._assigner.ask_for(await self._assigner.wanted())
        return done

    async def _follow(self) -> None:
        wanted, nodes = await self._assigner.wanted(), await self._nodes.list()
        assigned = self._assigner.assigned(nodes, wanted)
        self._missing = assigned.missing
        is_same = assigned.assignments == self.state.assignments
        asked = cause_of(self.state.assignments, assigned.assignments, nodes, wanted, self._hosts.given_up)
        if assigned.shortage != self._shortage:
            self._shortage = assigned.shortage
            log.warning("%s", assigned.shortage or "all wanted hosts fit again")
            self._assigner.ask_for(wanted)
            if is_same and assigned.shortage is not None:
                self.audit.end(asked, error=ConfigError(assigned.shortage))
            elif is_same:
                self.audit.end(replace(asked, why="all wanted hosts fit again"))
        if not is_same:
            await self.audit.recorded(asked, lambda: self._moved(assigned.assignments, self.state.num_hosts, asked.kind))

    def _moved(self, assignments: tuple[Assignment, ...], num_hosts: NumHosts, what: str) -> Awaitable[BroughtIn]:
        return self._in_steps(partial(moved, assignments=assignments, num_hosts=num_hosts, planner=self._planner), what)

    async def _in_steps(self, change: Change, what: str) -> BroughtIn:
        def bring_in(each: Change, step: str, gone: Collection[int]) -> Awaitable[BroughtIn]:
            return self._brought_in(each, f"{what}{step}", gone=gone)

        return await in_steps(self.state, change, self._planner, bring_in, self._hosts)

    async def _brought_in(self, change: Change, what: str, why: str = UNREADABLE, gone: Collection[int] = ()) -> BroughtIn:
        """Raises ConfigError when hosts have no room for it, or saying `why` when files cannot be read that it takes to work it out."""

        def changed(before: State) -> tuple[State, Transition | None]:
            after = change(before)
            require_room(before, after, self._planner)
            return after, cost_of(before, after, self._planner)

        priced = unless_stalled(in_thread(changed, self.state), lambda: None, self._planner.placing.load_timeout_s, lambda: why)
        after, cost = await priced
        return BroughtIn(await self._rollout.bring_in(after, what, gone), cost)
