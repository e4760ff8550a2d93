"""One host of a fleet: its actor, and its reservation on a node."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from moeserve.cluster.folders import SocketFolder
from moeserve.cluster.ray_ending import kill_processes
from moeserve.cluster.ray_expert_host import ExpertHost, HostOrder
from moeserve.cluster.ray_fate import Fate, fate_of
from moeserve.cluster.ray_internals import actor_id
from moeserve.cluster.timing import HANG_S, HOST_LOOK_S, LEAST_REST_S, MOST_REST_S, QUICK_LOOK_S, RETRY_S, START_TIMEOUT_S, WATCH_S, WELL_S
from moeserve.errors import ExpertUnavailable, MoEServeError
from moeserve.loops import in_thread
from moeserve.observe.stats import HostInfo, PassTime
from moeserve.release import Release

log = logging.getLogger(__name__)

#: how often in a row a host may die while it loads
MAX_DEATHS = 3

Call = Callable[[ActorHandle[ExpertHost]], Awaitable[None]]
#: the releases in force, and the public keys of frontends, if they are known
InForce = Callable[[], tuple[Sequence[Release], Collection[str]]]
#: why the latest process of this host has ended; may block for seconds
Findings = Callable[[Fate], str]


@dataclass(frozen=True)
class Place:
    """A placement group on a node, and the host's share of it. `detached`: it outlives this process."""

    node: str
    group: PlacementGroup
    cpus: float
    gpus: float
    detached: bool


class HostActor:
    """Ray restarts its process whenever it dies, on the same reservation, until that is released or its node is gone.

    A host that dies again and again before it is ready, or that cannot load its experts, waits between attempts, longer each time.
    """

    def __init__(self, order: HostOrder, place: Place, findings: Findings) -> None:
        self.name = order.name
        self.node, self.group = place.node, place.group
        #: Ray has given it up
        self.is_lost = False
        #: the latest look has found it with its experts loaded, and it has not been missed since
        self.is_up = False
        #: as it said when it answered last
        self.pass_time: PassTime | None = None
        self._order, self._place, self._findings = order, place, findings
        #: None between its end and the next attempt
        self._actor: ActorHandle[ExpertHost] | None = None
        #: while it loaded, since it was ready; restarts of this actor that are none of these
        self._deaths, self._restarts_before = 0, 0
        #: why it rests, or did before the present try; until when, and how long, in seconds of the monotonic clock
        self._error: MoEServeError | None = None
        self._rests_until = self._pause_s = 0.0
        #: since when the latest incarnation has been ready, and how often Ray had started it again by then
        self._ready: tuple[float, int] | None = None

    @property
    def actors(self) -> list[ActorHandle[ExpertHost]]:
        """The actor, if there is one now."""
        return [] if self._actor is None else [self._actor]

    @property
    def why_not(self) -> str | None:
        """Why it is down, if waiting for it cannot help."""
        return None if self._error is None else str(self._error)

    def start(self) -> None:
        """A new host, on a granted reservation."""
        place = self._place
        host = ExpertHost.options(  # type: ignore[attr-defined]
            num_cpus=place.cpus,
            num_gpus=place.gpus,
            scheduling_strategy=PlacementGroupSchedulingStrategy(self.group, 0),
            max_restarts=-1,
            max_task_retries=0,
            **({"name": self.name, "lifetime": "detached"} if place.detached else {}),
        )
        self._actor = host.remote(self._order)
        self._restarts_before, self._ready = 0, None

    async def adopt(self) -> None:
        """A detached host that is alive."""
        self._actor = ray.get_actor(self.name)
        self._restarts_before = (await self._fate()).restarts

    def wake(self) -> None:
        """Ends its wait: there is a new release, which it may be able to load."""
        self._rests_until = 0.0

    async def find(self, in_force: InForce) -> HostInfo:
        """The current incarnation, once it is ready with the current releases.

        Raises ExpertUnavailable when Ray has given it up or it has died too often, or the host's error; the same error while it waits.
        """
        self._require_no_rest()
        if self._actor is None:
            self._try_again()
        asking, asked = asyncio.ensure_future(self._ask(in_force)), self._known_restarts
        try:
            restarts, changed_at, began_at = -1, 0.0, time.monotonic()
            while not (await asyncio.wait({asking}, timeout=_pause_s(began_at)))[0]:
                fate = await self._fate()
                if fate.is_up or fate.restarts != restarts:
                    restarts, changed_at = fate.restarts, time.monotonic()
                await self._require_hope(fate, time.monotonic() - changed_at)
                if fate.is_up and fate.restarts != asked:
                    if asked is not None:  # Ray says only after seconds that the incarnation before will not answer
                        asking.cancel()
                        asking = asyncio.ensure_future(self._ask(in_force))
                    asked = fate.restarts
            info = asking.result()
        finally:
            asking.cancel()
        self._is_ready((await self._fate()).restarts)
        return info

    async def found(self, finding: Coroutine[Any, Any, HostInfo], sockets: SocketFolder) -> HostInfo:
        """The result of `finding` it. A host that hangs, or begins to meanwhile, is killed, so that Ray starts it again."""
        task = asyncio.ensure_future(finding)
        try:
            while True:
                if not await self.answers(HANG_S):
                    log.warning("%s has not answered for %g s: it is killed and restarted", self.name, HANG_S)
                    await kill_processes(self.actors, sockets)
                if (await asyncio.wait({task}, timeout=WATCH_S))[0]:
                    return task.result()
        finally:
            task.cancel()

    async def answers(self, timeout_s: float) -> bool:
        """False when its process is alive and does not answer: it hangs. A host that loads does answer."""
        if (actor := self._actor) is None:
            return True
        asking, began_at, known = asyncio.ensure_future(_heard(actor)), time.monotonic(), self._known_restarts
        try:
            while not (await asyncio.wait({asking}, timeout=_pause_s(began_at)))[0]:
                fate = await self._fate()
                if self._actor is not actor or not fate.is_up or fate.restarts != known:
                    return True  # it is restarting, or not: `find` handles that
                if time.monotonic() > began_at + timeout_s:
                    return False
        finally:
            asking.cancel()
        self.pass_time = asking.result()
        return True

    async def is_told(self, call: Call) -> bool:
        """`call` the actor; False when it has died meanwhile, or waits for its next attempt. Raises the host's error."""
        try:
            for actor in self.actors:
                await call(actor)
                return True
        except RayTaskError as error:
            raise error.cause from None
        except RayActorError as error:
            log.info("%s was lost meanwhile: %s", self.name, str(error).splitlines()[0])
        return False

    async def experts_read(self) -> int:
        """Since its present incarnation was started; 0 when there is none that answers."""
        with suppress(RayActorError):
            for actor in self.actors:
                count: int = await actor.experts_read.remote()
                return count
        return 0

    async def meet(self, directory: Mapping[int, HostInfo], frontends: Collection[str] | None) -> None:
        """A lost host gets the directory when it is found again; until then rows are sent to each host directly."""
        await self.is_told(lambda actor: actor.meet.remote(directory, frontends))

    async def died(self, deaths: int) -> ExpertUnavailable:
        """The error for users."""
        fate = await self._fate()
        return ExpertUnavailable(f"{self.name} died {deaths} times while it loaded its experts. {await self._found_of(fate)}".strip())

    async def _ask(self, in_force: InForce) -> HostInfo:
        while (actor := self._actor) is not None:
            releases, frontends = in_force()
            try:
                info: HostInfo | None = await actor.present.remote()
                if info is None:
                    self.is_up = False
                    releases, frontends = in_force()  # which may have changed while its process came up
                    info = await actor.start.remote(releases, frontends)
                return info
            except ActorUnavailableError:
                await asyncio.sleep(RETRY_S)
            except RayActorError as error:
                if actor is self._actor:
                    raise self._lost(str(error).splitlines()[0]) from None
            except RayTaskError as error:
                if in_force()[0] == releases:  # it may be able to load what is in force by now
                    raise self._begin_rest(self._refusal(error.cause)) from None
        assert self._error is not None, "it has no actor because of an error"
        raise self._error

    @property
    def _known_restarts(self) -> int | None:
        """Of the latest incarnation that has been ready."""
        return None if self._ready is None else self._ready[1]

    def _is_ready(self, restarts: int) -> None:
        now, self._error, self._deaths, self.is_up = time.monotonic(), None, 0, True
        if self._ready is None or self._ready[1] != restarts:
            self._restarts_before, self._ready = restarts + 1, (now, restarts)  # a death after that is not one while it loads
        elif now - self._ready[0] > WELL_S:
            self._pause_s = 0.0

    async def _require_hope(self, fate: Fate, waited_s: float) -> None:
        """Raises ExpertUnavailable when it will not come up soon."""
        self._require_no_rest()  # another caller has found out
        if not fate.is_node_live:
            raise self._lost(f"its node {self.node} is gone")
        new_deaths, actor = max(0, fate.restarts - self._restarts_before), self._actor
        if not (new_deaths and self._deaths + new_deaths >= MAX_DEATHS) and waited_s < START_TIMEOUT_S:
            return
        found = await self._found_of(fate)
        if actor is self._actor and actor is not None:
            self._deaths += new_deaths
            what = f"died {self._deaths} times while it loaded its experts" if new_deaths else f"was not started by Ray in {waited_s:.0f} s"
            self._actor = None
            ray.kill(actor)
            self._begin_rest(ExpertUnavailable(f"{self.name} {what}. {found}".strip()))
        self._require_no_rest()

    def _require_no_rest(self) -> None:
        if self._error is not None and time.monotonic() < self._rests_until:
            raise self._error

    def _begin_rest(self, error: MoEServeError) -> MoEServeError:
        self._pause_s = min(max(LEAST_REST_S, 2 * self._pause_s), MOST_REST_S)
        self._error, self._rests_until, self.is_up = error, time.monotonic() + self._pause_s, False
        return error

    def _try_again(self) -> None:
        try:
            self.start()
        except ValueError as error:  # Ray has not forgotten the previous actor, and its name is taken
            raise self._begin_rest(ExpertUnavailable(f"{self.name} cannot be started: {error}")) from None

    def _refusal(self, cause: Exception) -> MoEServeError:
        if isinstance(cause, MoEServeError):
            return cause
        return ExpertUnavailable(f"{self.name} cannot load its experts: {type(cause).__name__}: {cause}")

    def _lost(self, why: str) -> ExpertUnavailable:
        self.is_lost = True
        return ExpertUnavailable(f"{self.name} is gone for good: {why}")

    async def _fate(self) -> Fate:
        of = None if self._actor is None else actor_id(self._actor)
        return await in_thread(fate_of, of, self.node)

    async def _found_of(self, fate: Fate) -> str:
        return await in_thread(self._findings, fate)


def _pause_s(began_at: float) -> float:
    """Until the next look: soon at first, and more and more seldom."""
    return min(max(QUICK_LOOK_S, (time.monotonic() - began_at) / 5), HOST_LOOK_S)


async def _heard(actor: ActorHandle[ExpertHost]) -> PassTime | None:
    """Waits until it answers, or is gone."""
    try:
        answer: PassTime | None = await actor.pass_time.remote()
    except RayActorError as error:
        log.debug("a host is starting: %s", error)
        return None
    return answer
