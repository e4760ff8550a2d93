"""Keeps the hosts as they shall be: changes that somebody asks for, and those that nodes and hosts force by coming and going."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from moeserve.checkpoints import LayerSource, Swap
from moeserve.config import ServiceConfig
from moeserve.control.limits import least_hosts, most_hosts, plan_for
from moeserve.control.reconcile import reconcile
from moeserve.control.frontends import Frontends
from moeserve.control.overview import overview
from moeserve.control.rollout import Hosts, Rollout
from moeserve.control.seats import Node, Seat, Seating, Wanted
from moeserve.control.state import NumHosts, State
from moeserve.errors import ConfigError, MoEServeError
from moeserve.release import Release
from moeserve.standing import Standing
from moeserve.stats import HostInfo

log = logging.getLogger(__name__)

_LOOK_S = 1.0
_LONGEST_PAUSE_S = 60.0


class Nodes(Protocol):
    """The cluster's nodes."""

    async def list(self) -> list[Node]:
        """Those that live."""
        ...

    async def ask_for(self, num_hosts: int) -> None:
        """Tell the cluster's autoscaler, if there is one, that so many hosts shall have room."""
        ...


class HostFleet(Hosts, Protocol):
    """All hosts."""

    @property
    def given_up(self) -> Collection[int]:
        """Hosts that Ray will not bring back."""
        ...

    @property
    def present(self) -> Mapping[int, HostInfo]:
        """What hosts that are up have said of themselves."""
        ...


async def first_state(config: ServiceConfig, sources: Sequence[LayerSource], nodes: Nodes) -> State:
    """Where the hosts of a new service go. Raises ConfigError when the nodes do not hold them, after placement.wait_for_nodes_s."""
    wish = _first_wish(config, sources)
    seating = await _seating_with_patience(config, nodes, lambda known: reconcile(known, (), wanted_hosts(config, sources, wish), 0))
    release = Release(plan_for(len(seating.seats), sources, config))
    return State(release, seating.seats, wish, release.epoch, len(seating.seats))


def _first_wish(config: ServiceConfig, sources: Sequence[LayerSource]) -> NumHosts:
    placing = config.placement
    if placing.experts_per_host is None or "num_hosts" in placing.model_fields_set:
        return placing.num_hosts
    return least_hosts(sources, config)


def wanted_hosts(config: ServiceConfig, sources: Sequence[LayerSource], num_hosts: NumHosts) -> Wanted:
    """What `reconcile` needs to know of the configuration. Raises ConfigError when so many hosts cannot share the experts."""
    placing = config.placement
    if num_hosts != "all":
        plan_for(num_hosts, sources, config)
    least = least_hosts(sources, config)
    most = most_hosts(least, sources, config) if num_hosts == "all" else None
    return Wanted(num_hosts, placing.cpus_per_host, placing.gpus_per_host, placing.node_labels, placing.node_strategy, least, most)


async def _seating_with_patience(config: ServiceConfig, nodes: Nodes, seat: Callable[[Sequence[Node]], Seating]) -> Seating:
    """What `seat` makes of the nodes, once nothing is short; what is short may be on its way for placement.wait_for_nodes_s."""
    until = time.monotonic() + config.placement.wait_for_nodes_s
    said = None
    while (seating := seat(await nodes.list())).shortage is not None:
        if time.monotonic() >= until:
            raise ConfigError(seating.shortage)
        if seating.shortage != said:
            log.info("waiting for nodes: %s", seating.shortage)
        said = seating.shortage
        await asyncio.sleep(_LOOK_S)
    return seating


class Controller:
    """One change at a time, and each to its end, even if whoever asked for it hangs up. `save` is given what a successor must know."""

    def __init__(
        self,
        config: ServiceConfig,
        sources: Sequence[LayerSource],
        state: State,
        nodes: Nodes,
        hosts: HostFleet,
        frontends: Frontends,
        save: Callable[[State], None],
    ) -> None:
        #: set when somebody who may has asked for the service to end
        self.stop_requested = asyncio.Event()
        self._config = config
        self._sources = sources
        self._frontends = frontends
        self._nodes = nodes
        self._hosts = hosts
        self._rollout = Rollout(config, state, hosts, frontends, save)
        self._one_at_a_time = asyncio.Lock()
        self._changes: set[asyncio.Task[Release]] = set()
        self._wanted_now: Wanted | None = None
        self._shortage: str | None = None

    @property
    def state(self) -> State:
        """What is served, and what was asked for."""
        return self._rollout.state

    def standing(self) -> Standing:
        """What is deployed and where, for people."""
        names = [source.spec.name for source in self._sources]
        present, frontends = self._hosts.present, self._frontends.members()
        return overview(self.state, self._rollout.is_under_way, self._shortage, names, present, frontends)

    def ask_to_stop(self) -> None:
        """Whoever runs the service is told by `stop_requested`."""
        self.stop_requested.set()

    async def swap(self, layer: str, checkpoint: Path, experts: Sequence[int] | None = None) -> Release:
        """Serve a layer, or some of its experts, with the weights of another folder of the same model.

        Raises UnknownLayer, ConfigError or CheckpointError; then everything is as it was. Files are read on the hosts: `checkpoint` must
        be there, and here.
        """
        swap = Swap(layer, checkpoint, None if experts is None else frozenset(experts))
        return await self._to_its_end(self._change(lambda: self._rollout.swap(swap)))

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

    async def keep(self) -> None:
        """Follow the nodes and the hosts, until cancelled: what is lost is replaced or placed on the rest, what joins is used."""
        pause_s = _LOOK_S
        while True:
            await asyncio.sleep(pause_s)
            try:
                await self._to_its_end(self._change(self._follow))
                pause_s = _LOOK_S
            except MoEServeError as error:
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
                log.warning("hosts cannot follow the nodes: %s; next try in %g s", error, pause_s)

    async def _to_its_end(self, change: Coroutine[Any, Any, Release]) -> Release:
        """A caller who hangs up does not leave a change half made."""
        task = asyncio.ensure_future(change)
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)
        return await asyncio.shield(task)

    async def _change(self, change: Callable[[], Coroutine[Any, Any, Release]]) -> Release:
        async with self._one_at_a_time:
            return await change()

    async def _scale(self, num_hosts: NumHosts) -> Release:
        if num_hosts != "all" and num_hosts < 1:
            raise ConfigError("at least one host is needed")
        wanted = await asyncio.to_thread(wanted_hosts, self._config, self._sources, num_hosts)
        if num_hosts != "all":
            await self._nodes.ask_for(num_hosts)
        try:
            # Nodes may be minutes away: meanwhile others are followed.
            await _seating_with_patience(self._config, self._nodes, lambda nodes: self._seating(nodes, wanted))
        except ConfigError:
            await self._ask_for_what_is_wished()
            raise
        return await self._change(lambda: self._reach(num_hosts, wanted))

    async def _reach(self, num_hosts: NumHosts, wanted: Wanted) -> Release:
        seating = self._seating(await self._nodes.list(), wanted)
        if seating.shortage is not None:
            raise ConfigError(seating.shortage)
        release = await self._rollout.move(seating.seats, num_hosts)
        await self._ask_for_what_is_wished()
        return release

    async def _drain(self, host: str) -> Release:
        seats = self.state.seats
        left = tuple(seat for seat in seats if f"host-{seat.number}" != host)
        if len(left) == len(seats):
            raise ConfigError(f"there is no host {host!r}; there are {', '.join(f'host-{seat.number}' for seat in seats)}")
        if not left:
            raise ConfigError(f"{host} is the only host: at least one is needed")
        release = await self._rollout.move(left, len(left))
        await self._ask_for_what_is_wished()
        return release

    async def _follow(self) -> Release:
        seating = self._seating(await self._nodes.list(), await self._wanted())
        if seating.shortage != self._shortage:
            self._shortage = seating.shortage
            log.warning("%s", seating.shortage or "nothing is short any more")
        return await self._rollout.move(seating.seats, self.state.num_hosts)

    async def _wanted(self) -> Wanted:
        if self._wanted_now is None or self._wanted_now.num_hosts != self.state.num_hosts:
            self._wanted_now = await asyncio.to_thread(wanted_hosts, self._config, self._sources, self.state.num_hosts)
        return self._wanted_now

    def _seating(self, nodes: Sequence[Node], wanted: Wanted) -> Seating:
        return reconcile(nodes, self.state.seats, wanted, self.state.next_number, self._hosts.given_up)

    async def _ask_for_what_is_wished(self) -> None:
        if self.state.num_hosts != "all":
            await self._nodes.ask_for(self.state.num_hosts)
