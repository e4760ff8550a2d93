"""One host of a fleet: its actor, and its place on a node."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence

import ray
from ray._private import state
from ray.actor import ActorHandle
from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from moeserve.cluster.expert_host import ExpertHost, HostOrder
from moeserve.control import Seat
from moeserve.errors import ExpertUnavailable
from moeserve.release import Release
from moeserve.stats import HostInfo, host_name

log = logging.getLogger(__name__)

_RETRY_S = 0.1
#: how often a host may die while it loads a release
MAX_DEATHS = 3

Call = Callable[[ActorHandle[ExpertHost]], Awaitable[None]]


class Member:
    """Ray starts its process again whenever it dies, on the same place, until the place is given back or its node is gone."""

    def __init__(self, seat: Seat, actor: ActorHandle[ExpertHost], group: PlacementGroup) -> None:
        self.name = host_name(seat.number)
        self.node = seat.node
        self.actor = actor
        self.group = group
        #: Ray has given it up
        self.is_lost = False

    @classmethod
    def started(cls, seat: Seat, order: HostOrder, group: PlacementGroup, *, detached: bool) -> Member:
        """A new one, on a place that has been granted."""
        placing = order.config.placement
        host = ExpertHost.options(  # type: ignore[attr-defined]
            num_cpus=placing.cpus_per_host,
            num_gpus=placing.gpus_per_host,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, 0),
            max_restarts=-1,
            max_task_retries=0,
            **({"name": order.name, "lifetime": "detached"} if detached else {}),
        )
        return cls(seat, host.remote(order), group)

    @classmethod
    def found(cls, seat: Seat, group: PlacementGroup) -> Member:
        """A detached one that lives."""
        return cls(seat, ray.get_actor(host_name(seat.number)), group)

    async def find(
        self, releases: Callable[[], Sequence[Release]], frontends: Callable[[], Collection[str] | None], patient: bool
    ) -> HostInfo:
        """The present incarnation, once it is ready with the `releases` in force by then.

        Raises ExpertUnavailable when Ray has given it up or, unless `patient`, it dies again and again; or what the host raised.
        """
        deaths_before, _ = await asyncio.to_thread(self._fate)
        while True:
            try:
                info: HostInfo | None = await self.actor.present.remote()
                return info or await self.actor.start.remote(releases(), frontends() or ())
            except ActorUnavailableError:
                deaths, is_node_live = await asyncio.to_thread(self._fate)
                if not is_node_live:
                    raise self._lost(f"its node {self.node} is gone") from None
                if not patient and deaths - deaths_before >= MAX_DEATHS:
                    raise self.died_too_often() from None
                await asyncio.sleep(_RETRY_S)
            except RayActorError as error:
                raise self._lost(str(error).splitlines()[0]) from None
            except RayTaskError as error:
                raise error.cause from None

    async def answers(self, timeout_s: float) -> bool:
        """False when its process lives and says nothing, as one does that hangs; loading does not keep it from answering."""
        try:
            async with asyncio.timeout(timeout_s):
                await self.actor.present.remote()
        except TimeoutError:
            return False
        except RayActorError as error:
            log.debug("%s is on its way: %s", self.name, error)  # for `find` to see to
        return True

    async def is_told(self, call: Call) -> bool:
        """`call` the actor; False when it has died meanwhile. Raises what the host raised."""
        try:
            await call(self.actor)
            return True
        except RayTaskError as error:
            raise error.cause from None
        except RayActorError as error:
            log.info("%s was lost meanwhile: %s", self.name, str(error).splitlines()[0])
            return False

    async def meet(self, directory: Mapping[int, HostInfo], frontends: Collection[str] | None) -> None:
        """One that is gone is introduced when it is found again; until then rows are sent to each host directly."""
        await self.is_told(lambda actor: actor.meet.remote(directory, frontends))

    def died_too_often(self) -> ExpertUnavailable:
        return ExpertUnavailable(f"{self.name} died {MAX_DEATHS} times while it loaded its experts; Ray's logs of it say why")

    def _lost(self, why: str) -> ExpertUnavailable:
        self.is_lost = True
        return ExpertUnavailable(f"{self.name} is gone for good: {why}")

    def _fate(self) -> tuple[int, bool]:
        """How often Ray has started it again, and whether it can do so once more: a place that is lost with its node never comes back."""
        is_node_live = any(node["Alive"] and node["NodeID"] == self.node for node in ray.nodes())
        return state.actors(self.actor._actor_id.hex()).get("NumRestarts", 0), is_node_live
