"""Hosts follow the load: their number, while the service runs."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Final, Protocol

from moeserve.config import Copies
from moeserve.control import timing
from moeserve.control.autoscale import Bounds, Resize, Sizing
from moeserve.control.busy import BusyShares
from moeserve.control.desired import Planner
from moeserve.control.first_state import Nodes
from moeserve.control.fleet import HostFleet
from moeserve.control.frontends import Frontends
from moeserve.control.reconcile import reconcile
from moeserve.control.state import NumHosts, State
from moeserve.errors import MoEServeError
from moeserve.loops import in_thread
from moeserve.release import Release

log = logging.getLogger(__name__)

_NONE: Final = (0, 0)


class Resized(Protocol):
    """The service whose hosts come and go."""

    @property
    def state(self) -> State:
        """What is served, and the desired number of hosts."""
        ...

    async def scale(self, num_hosts: NumHosts, why: str, instead_of: int) -> Release:
        """Hosts start or leave, if `instead_of` is still the desired number; it is recorded `why`.

        Raises MoEServeError; then nothing has changed.
        """
        ...


class Autoscaler:
    """Hears how busy hosts are, and tells frontends. If autoscaling is enabled, it changes the number of hosts.

    Where more are wanted than fit, as many start as fit, and the cluster's autoscaler, if there is one, is asked for nodes for all of them.
    """

    def __init__(self, planner: Planner, served: Resized, nodes: Nodes, hosts: HostFleet, frontends: Frontends) -> None:
        self._planner, self._served, self._nodes, self._hosts, self._frontends = planner, served, nodes, hosts, frontends
        self._config = planner.autoscaling
        self._shares = BusyShares(timing.BUSY_WINDOW_S)
        self._sizing = Sizing(self._config)
        #: and the copies that they are for
        self._bounds_now: tuple[Bounds, Copies | None] | None = None
        #: until when the request for more nodes stands, unless it is made again
        self._asks_until: float | None = None
        #: so many hosts the load needs, until they run; and so many of them have no room
        self.wanted = _NONE
        self._said = ""

    async def keep(self) -> None:
        """Until cancelled."""
        await asyncio.gather(self._keep_hearing(), *([self._keep_deciding()] if self._config.enabled else []))

    async def _keep_hearing(self) -> None:
        while True:
            now = time.monotonic()
            self._shares.hear(self._hosts.pass_times, now)
            self._frontends.set_busy(self._shares.shares(now), now)
            await asyncio.sleep(timing.CONTROL_LOOK_S)

    async def _keep_deciding(self) -> None:
        while True:
            await asyncio.sleep(min(timing.CONTROL_LOOK_S, self._config.scale_up_after_s, self._config.scale_down_after_s))
            await self._follow(time.monotonic())

    async def _follow(self, now: float) -> None:
        try:
            state, shares = self._served.state, self._shares.shares(now)
            hosts = state.wanted_hosts
            known = [shares.get(assignment.number) for assignment in state.assignments]
            resize = self._sizing.decide(now, hosts, known, await self._bounds(state.copies))
            if resize is not None:
                await self._carry_out(resize)
            elif self._asks_until is not None and now > self._asks_until:
                await self._ask(hosts)
                self._asks_until, self.wanted = None, _NONE
        except Exception as error:  # any error, of Ray for example: try again when the load still needs it
            self._say_problem(str(error) if isinstance(error, MoEServeError) else repr(error))

    async def _carry_out(self, resize: Resize) -> None:
        state = self._served.state
        wanted = await in_thread(self._planner.with_copies(state.copies).wanted, resize.wanted)
        assigned = reconcile(await self._nodes.list(), state.assignments, wanted, state.next_number, self._hosts.given_up)
        self.wanted = resize.wanted, assigned.missing
        number = resize.wanted if assigned.shortage is None else max(resize.hosts, len(assigned.assignments))
        try:
            if number != resize.hosts:
                await self._served.scale(number, f"autoscaling: {resize}", resize.hosts)
                self._said = ""
        finally:  # however that ends, nothing is missing for longer than the load says so
            if assigned.shortage is None:
                self.wanted = _NONE
            else:
                self._asks_until = time.monotonic() + 2 * self._config.scale_up_after_s
        if assigned.shortage is not None:
            await self._ask(resize.wanted)
            self._say_problem(assigned.shortage)

    async def _ask(self, num_hosts: int) -> None:
        """Of the cluster's autoscaler."""
        if self._planner.placing.wait_for_nodes_s:
            self._nodes.ask_for(await in_thread(self._planner.with_copies(self._served.state.copies).wanted, num_hosts), num_hosts)

    async def _bounds(self, copies: Copies | None) -> Bounds:
        if self._bounds_now is None or self._bounds_now[1] != copies:
            self._bounds_now = await in_thread(self._planner.with_copies(copies).bounds), copies
        return self._bounds_now[0]

    def _say_problem(self, why: str) -> None:
        """Once, until it is another one or a decision succeeds."""
        if why != self._said:
            log.warning("autoscaling: the number of hosts stays as it is for now: %s", why)
        self._said = why
