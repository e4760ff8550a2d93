"""A release's hosts as Ray actors on their assigned nodes: started side by side, found again after a restart, stopped together."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path

import ray
from ray.util.placement_group import PlacementGroup

from moeserve.cluster.folders import SocketFolder, remove_abandoned
from moeserve.cluster.loading import Loading
from moeserve.cluster.looks import Looks
from moeserve.cluster.process_ends import ProcessEnds
from moeserve.cluster.ray_ending import end_hosts
from moeserve.cluster.ray_expert_host import HostOrder
from moeserve.cluster.ray_fate import PostMortem
from moeserve.cluster.ray_host_actor import MAX_DEATHS, Call, HostActor, Place
from moeserve.cluster.ray_loss import unless_lost
from moeserve.cluster.ray_reservation import await_forgotten, find_hosts, find_reservations, give_back, reserve_all
from moeserve.cluster.ray_spare import Spares
from moeserve.cluster.ray_where import this_node
from moeserve.cluster.timing import END_TIMEOUT_S, FORGET_TIMEOUT_S, MEET_TIMEOUT_S, WATCH_S
from moeserve.config import PlacementConfig, RayConfig, ServedModel
from moeserve.control import Assignment
from moeserve.errors import ExpertUnavailable, MoEServeError
from moeserve.loops import all_or_none, in_thread
from moeserve.observe.stats import HostInfo, PassTime, host_name
from moeserve.release import Release

log = logging.getLogger(__name__)

OnReady = Callable[[HostInfo], None]


class RayFleet:
    """All hosts, by number, and the releases they have: one, or two while the second is brought in.

    `detached`: they outlive this process, and the next one `adopt`s them by their names in its Ray namespace.
    """

    def __init__(self, model: ServedModel, placing: PlacementConfig, ray: RayConfig, *, detached: bool) -> None:
        self._model, self._placing, self._temp_dir = model, placing, ray.temp_dir
        self._detached = detached
        self._releases: list[Release] = []
        self._members: dict[int, HostActor] = {}
        self._directory: dict[int, HostInfo] = {}
        self._on_change: Callable[[Mapping[int, HostInfo]], None] = lambda _: None
        #: None until they are known: until then, hosts keep the keys they know
        self._frontends: frozenset[str] | None = None
        self._folder: SocketFolder | None = None
        self._over_tcp = True
        #: hosts that Ray has given up, until they are removed: their node is gone
        self.given_up: set[int] = set()
        self._post_mortem = PostMortem(model)
        self._ray_lost: str | None = None
        self._ends, self._spares = ProcessEnds(), Spares()
        self._loading = Loading(lambda number: self._members[number].experts_read())

    @property
    def reservations(self) -> set[str]:
        """Ids of the placement groups of its hosts."""
        return {member.group.id.hex() for member in self._members.values()}

    @property
    def present(self) -> dict[int, HostInfo]:
        """The descriptions of the hosts that were up when they were last looked for; one that loads, or rests, is not."""
        return {number: info for number, info in self._directory.items() if number in self._members and self._members[number].is_up}

    @property
    def pass_times(self) -> dict[int, PassTime]:
        """How busy each host has been, as it said when it answered last."""
        return {number: member.pass_time for number, member in self._members.items() if member.pass_time is not None}

    @property
    def loading(self) -> Mapping[int, int]:
        """Hosts that a change waits for, and how many experts each has read."""
        return self._loading.experts

    @property
    def failing(self) -> dict[int, str]:
        """Hosts that are down and not restarting now, and why; those whose node is gone are `given_up`."""
        if self._ray_lost is not None:
            return dict.fromkeys(self._members, self._ray_lost)
        return {number: why for number, member in self._members.items() if (why := member.why_not) is not None}

    def lose(self, why: str) -> None:
        """Ray does not answer any more; the owner of Ray ends what is left."""
        self._ray_lost = why

    def start(self, service_id: str, *, over_tcp: bool = True, folder: Path | None = None) -> None:
        """Call it first. `service_id` names the private folder for sockets that hosts make on every node, or within `folder`.

        `over_tcp`: frontends and hosts on other nodes, or outside Ray, reach hosts, too, with keys (`admit`).
        """
        self._folder, self._over_tcp = SocketFolder(service_id, self._temp_dir, folder), over_tcp

    @property
    def _sockets(self) -> SocketFolder:
        assert self._folder is not None, "the fleet was started"
        return self._folder

    async def take(self, release: Release, assignments: Sequence[Assignment], on_ready: OnReady = lambda _: None) -> None:
        """Each assigned host of `release` loads its new experts, and is started first if needed; `on_ready` is called for each started one.

        A host that dies meanwhile comes back with it. Raises ConfigError when a node has no room any more, an error of a host,
        or ExpertUnavailable when one dies again and again or Ray gives it up.
        """
        self._releases = [*self._releases, release]
        new = [each for each in assignments if each.number not in self._members]
        for member in self._members.values():
            member.wake()
        await self._add(new)
        await all_or_none(self._loading.wait(each.number, partial(self._come_up, each.number, on_ready)) for each in new)
        numbers = {each.number for each in assignments} & {*release.placement.hosts}
        await all_or_none(self._loading.wait(one, partial(self._tell, one, lambda actor: actor.take.remote(release))) for one in numbers)

    async def adopt(self, release: Release, assignments: Sequence[Assignment]) -> None:
        """Take over the detached hosts of an earlier process: those of `assignments` serve `release`, all others end.

        They keep earlier releases until `retire`. Missing hosts are started, unless their node is gone: then they are `given_up`. Does not
        wait long for hosts that are not ready.
        """
        self._releases = [release]
        groups, living = await in_thread(find_reservations), await in_thread(find_hosts)
        nodes = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        whole = living & groups.keys() & {each.number for each in assignments}
        await end_hosts([ray.get_actor(host_name(number)) for number in living - whole], self._sockets)
        for number in groups.keys() - whole:
            give_back(groups[number])
        self._members = {each.number: self._member(each, groups[each.number]) for each in assignments if each.number in whole}
        for member in self._members.values():
            await member.adopt()
        await await_forgotten((living | groups.keys()) - whole, FORGET_TIMEOUT_S)
        missing = [each for each in assignments if each.number not in self._members]
        self.given_up = {each.number for each in missing if each.node not in nodes}
        await self._add([each for each in missing if each.node in nodes])
        await self._have_forget(lambda actor: actor.adopt.remote(release))

    def admit(self, public_keys: Collection[str]) -> asyncio.Future[None]:
        """Only frontends with these keys may talk to hosts over TCP; returns when the hosts know."""
        self._frontends = frozenset(public_keys)
        return asyncio.ensure_future(self._meet())

    async def find(self, number: int) -> HostInfo:
        """The current incarnation of a host; waits until it is ready, also while Ray restarts it.

        Raises ExpertUnavailable when Ray has given the host up or it dies again and again, or the host's error.
        """
        if self._ray_lost is not None:
            raise ExpertUnavailable(self._ray_lost)
        if number not in self._members:
            raise ExpertUnavailable(f"{host_name(number)} {'is gone for good' if number in self.given_up else 'was removed'}")
        member = self._members[number]
        try:
            info = await member.find(lambda: (self._releases, self._frontends or ()))
        except ExpertUnavailable:
            if member.is_lost and self._members.get(number) is member:
                self._give_up(number)
            raise
        if self._members.get(number) is member:
            await self._introduce(number, info)
        return info

    async def watch(self, on_change: Callable[[Mapping[int, HostInfo]], None]) -> None:
        """Runs until cancelled: looks for each host about once a second, and reports every change of the hosts and where they are.

        A host counts as down as soon as its process is seen to end, or when it has not answered for MISSED_S.
        """
        looks = Looks(self._look)
        self._on_change = on_change
        self._announce()
        try:
            while True:
                looks.begin(self._members)
                ended = await self._ends.wait(WATCH_S)
                for number in (ended | looks.missed()) & self._members.keys():
                    self._members[number].is_up = False
        finally:
            self._ends.close()
            looks.end()

    async def withdraw(self, epoch: int) -> None:
        """Hosts forget the withdrawn release of `epoch`, and all after it."""
        self._releases = [release for release in self._releases if release.epoch < epoch]
        await self._have_forget(lambda actor: actor.withdraw.remote(epoch))

    async def retire(self, epoch: int) -> None:
        """Hosts forget the releases before `epoch`."""
        self._releases = [release for release in self._releases if release.epoch >= epoch]
        await self._have_forget(lambda actor: actor.retire.remote(epoch))

    async def remove(self, numbers: Sequence[int]) -> None:
        """Stop these hosts for good and release their reservations; the others stop talking to them."""
        leaving = [self._members.pop(number) for number in numbers if number in self._members]
        self.given_up.difference_update(numbers)
        for number in numbers:
            self._directory.pop(number, None)
        self._announce()
        await self._end(leaving)
        if leaving:
            await self._meet()

    async def stop(self) -> None:
        """Stop the hosts, in any state; they leave nothing on this node, nor on other nodes that answer."""
        leaving = list(self._members.values())
        self._members.clear()
        self._directory.clear()
        if self._folder is not None:
            if self._ray_lost is None:
                await unless_lost(self._end(leaving), END_TIMEOUT_S)
            await in_thread(remove_abandoned, self._folder.path())

    async def _add(self, assignments: Sequence[Assignment]) -> None:
        """Ask Ray for these additional hosts. Raises ConfigError, and starts none, if one has no room on its node."""
        groups = await reserve_all(assignments, self._placing, detached=self._detached)
        for each, group in zip(assignments, groups, strict=True):
            self._members[each.number] = self._member(each, group)
            self._members[each.number].start()

    def _member(self, assignment: Assignment, group: PlacementGroup) -> HostActor:
        order = HostOrder(assignment.number, self._model, self._sockets, self._over_tcp, self._placing.memory_per_host_bytes)
        place = Place(assignment.node, group, self._placing.cpus_per_host, self._placing.gpus_per_host, self._detached)
        findings = partial(self._post_mortem.findings, assignment, lambda: self._releases[-1])
        return HostActor(order, place, findings)

    async def _come_up(self, number: int, on_ready: OnReady) -> None:
        on_ready(await self.find(number))

    async def _tell(self, number: int, call: Call) -> None:
        """`call` a host; one that has died needs no call, because it starts again with the releases in force."""
        for _ in range(MAX_DEATHS):
            await self.find(number)
            member = self._members.get(number)
            if member is not None and await member.is_told(call):
                return
        raise ExpertUnavailable(f"{host_name(number)} has left") if member is None else await member.died(MAX_DEATHS)

    async def _have_forget(self, call: Call) -> None:
        """`call` the hosts of the release in force, and wait a while for their answers."""
        numbers = self._releases[-1].placement.hosts if self._releases else ()
        calls = {asyncio.ensure_future(self._tell(number, call)): number for number in numbers if number not in self.given_up}
        done, late = await asyncio.wait(calls, timeout=FORGET_TIMEOUT_S) if calls else ((), ())
        for future in done:
            if (error := future.exception()) is not None:
                log.warning("%s could not be told which releases to forget: %s", host_name(calls[future]), error)
        for future in late:
            log.warning("%s has not answered yet", host_name(calls[future]))
            future.cancel()

    async def _look(self, number: int) -> None:
        if (member := self._members.get(number)) is None:  # it has left since
            return
        before = self.failing.get(number)
        try:
            info = await member.found(self.find(number), self._sockets)
            if info.node == this_node():
                self._ends.watch(info.pid, number)
            await self._spares.renew(number, info)
        except MoEServeError as error:
            if str(error) != before:
                log.warning("%s", error)
            await asyncio.sleep(WATCH_S)

    async def _introduce(self, number: int, info: HostInfo) -> None:
        """Tells every host where all hosts are, once all have been found, and again after every new incarnation."""
        if self._directory.get(number) == info:
            return
        self._directory[number] = info
        self._announce()
        if len(self._directory) == len(self._members):
            await self._meet()

    def _announce(self) -> None:
        self._on_change(dict(self._directory))

    async def _meet(self) -> None:
        directory, frontends = dict(self._directory), self._frontends
        if meetings := [asyncio.ensure_future(member.meet(directory, frontends)) for member in self._members.values()]:
            await asyncio.wait(meetings, timeout=MEET_TIMEOUT_S)

    def _give_up(self, number: int) -> None:
        """Releases its reservation for another host: it will not come back there."""
        lost = self._members.pop(number)
        for actor in lost.actors:
            ray.kill(actor)
        give_back(lost.group)
        self._directory.pop(number, None)
        self._announce()
        self.given_up.add(number)

    async def _end(self, members: Sequence[HostActor]) -> None:
        await end_hosts([actor for member in members for actor in member.actors], self._sockets)
        for member in members:
            give_back(member.group)
