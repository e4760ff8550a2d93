"""A whole service in this process, without Ray: hosts in threads, real channels between them and the frontend, a real gRPC server."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import torch

from moeserve.checkpoints import ServedLayers
from moeserve.config import ServedModel, load_config
from moeserve.control import Assignment, Controller, FrontendInfo, Frontends, Node, Planner, State, Wanted
from moeserve.errors import MoEServeError
from moeserve.experts import ExpertBank
from moeserve.frontend import Frontend, FrontendSettings, HostAccess
from moeserve.host import Holdings, HostLoop, Relay
from moeserve.observe.metrics import Metrics
from moeserve.observe.stats import HostInfo
from moeserve.placement import plan_placement
from moeserve.release import Release
from moeserve.server import Control, GrpcServer, controller_address, frontend_tokens
from moeserve.transport import HostKeys, KeyPair, Work, listen

Result = TypeVar("Result")
Kind = Literal["local", "shm", "tcp"]
CHANNELS: tuple[Kind, ...] = ("local", "shm", "tcp")


class Killed(BaseException):
    """Raised by a bank under a test's hand: the host is gone, in the middle of a pass."""


class CountingLoop(HostLoop):
    """Counts the messages that arrive, and may die as a killed process does: without a word."""

    received = 0

    def run(self) -> None:
        with suppress(Killed):
            super().run()

    def _serve(self, layer: int, bank: ExpertBank | None, works: Sequence[Work]) -> None:
        self.received += len(works)
        super()._serve(layer, bank, works)


class ThreadedHost:
    """One expert host in a thread; `start` after `stop` gives it a new endpoint, as a new process would have.

    On a `node` other than the frontend's it is reached over TCP with keys. `on_start` is told of every incarnation.
    """

    def __init__(
        self,
        number: int,
        kind: Kind,
        folder: Path,
        model: ServedModel,
        releases: list[Release],
        node: str,
        admitted: Callable[[], frozenset[str]],
        on_start: Callable[[], None],
    ) -> None:
        self.number, self._kind, self._folder, self._model, self._releases, self.node = number, kind, folder, model, releases, node
        self._admitted, self._on_start = admitted, on_start
        self._incarnation = 0
        self._loop_of_service = asyncio.get_running_loop()
        self._up, self._looking = asyncio.Event(), asyncio.Lock()
        self.start()

    def start(self) -> None:
        """Loads, or has a `refusal`, and then is not up."""
        self._incarnation += 1
        name = f"host-{self.number}-{self._incarnation}"
        endpoint = {"local": f"local:{self._folder}/{name}", "shm": f"unix:{self._folder}/{name}.sock", "tcp": "tcp://127.0.0.1:0"}
        own = KeyPair.generate()
        self.keys = HostKeys(own, self._admitted())
        listener = listen(*dict.fromkeys((endpoint[self._kind], endpoint["tcp"])), keys=self.keys)
        self.info = HostInfo(f"host-{self.number}", listener.endpoints, own.public, node=self.node, device="cpu", num_threads=1)
        self.relay = Relay(self.number, own)
        self.holdings = Holdings(self._model, self.number, torch.device("cpu"))
        self.refusal: MoEServeError | None = None
        try:
            self.holdings.begin(self._releases)
        except MoEServeError as error:
            listener.close()
            self.relay.close()
            self.refusal = error
            self._loop_of_service.call_soon_threadsafe(self._up.set)
            return
        self.info = replace(self.info, since_epoch=self.holdings.since_epoch)
        self.loop = CountingLoop(self.holdings.bank_table, listener, self.relay)
        self._thread = threading.Thread(target=self.loop.run)
        self._thread.start()
        self.is_up = True
        self._on_start()
        self._loop_of_service.call_soon_threadsafe(self._up.set)

    def meet(self, directory: Mapping[int, HostInfo]) -> None:
        self.keys.allow({*self._admitted(), *(info.public_key for info in directory.values())})
        self.relay.meet(directory)

    def stop(self) -> None:
        self.is_up = False
        self._loop_of_service.call_soon_threadsafe(self._up.clear)
        self.loop.stop()
        self._thread.join()

    async def find(self) -> HostInfo:
        """Raises why it is not up: it tries once more first, as the process of a host does when it is asked again."""
        async with self._looking:
            if self.refusal is not None:
                await asyncio.to_thread(self.start)
        await self._up.wait()
        if self.refusal is not None:
            raise self.refusal
        return self.info


class EndlessNodes:
    """Nodes of these names, with room for everything."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = dict.fromkeys(names)
        self.cpus = 1000.0

    async def list(self) -> list[Node]:
        room = {"CPU": self.cpus, "GPU": 0.0}
        return [Node(name, name, room, room) for name in self._names]

    def ask_for(self, wanted: Wanted, num_hosts: int) -> None:
        raise AssertionError("there is always room")


class ServiceHarness:
    """`with ServiceHarness(config, kind, tmp_path) as service: Client(service.target)`.

    `nodes` says where each host is; the frontend is on the first host's node.
    """

    def __init__(self, config: Mapping[str, Any], kind: Kind, folder: Path, nodes: Sequence[str] = ()) -> None:
        self.config = load_config({"server": {"port": 0}, **config})
        self.layers = ServedLayers.read(self.config)
        self.sources, specs = self.layers.sources, self.layers.specs
        self.metrics = Metrics(specs, self.config.observability.expert_detail)
        self.placement = plan_placement(specs, self.config.placement)
        self._releases = [Release.first(self.placement, self.sources)]
        self._kind, self._folder = kind, folder
        self.nodes = nodes or ["this-node"] * self.placement.num_hosts
        self._keys = KeyPair.generate()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self.hosts: list[ThreadedHost] = []
        self.target = ""
        self.given_up: set[int] = set()
        #: why hosts that are down do not come back
        self.failing: dict[int, str] = {}
        self.service_id = "the-service"
        #: keys of frontends elsewhere
        self._followers: frozenset[str] = frozenset()
        self.control_server: GrpcServer | None = None
        self.control_target = ""

    def call(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Run a coroutine on the service's loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=60)

    def __enter__(self) -> Self:
        self._thread.start()
        self.call(self._start())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.control_server is not None:
            self.call(self.control_server.stop())
        self.call(self.server.drain(5.0))
        self.call(self.frontend.close())
        for host in self.hosts:
            if host.is_up:
                host.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _start(self) -> None:
        self._add(self.placement.hosts)
        release, settings = self._releases[0], FrontendSettings.of(self.config, self.config.server)
        hosts = HostAccess(self.find, self._keys, self._on_health)
        self.frontend = Frontend(release, release.sources(self.layers), settings, hosts, self.metrics)
        assignments = tuple(Assignment(number, self.nodes[number]) for number in self.placement.hosts)
        self._begin(State(release, assignments, len(assignments), release.epoch, len(assignments)), ())
        self.server = GrpcServer(self.config.server, self.metrics.observe_call, engine=self.frontend, admin=self.controller)
        self.target = f"127.0.0.1:{await self.server.start()}"
        await self.frontend.start(self.nodes[0])

    def _begin(self, state: State, keys: Collection[str]) -> None:
        """A controller that knows this state, and the keys of frontends elsewhere."""
        self.frontends = Frontends(self.service_id, self.config, self.config.server.drain_timeout_s, self._admit, keys)
        self.frontends.include(
            self.frontend, lambda: FrontendInfo("local", self.target, "", "", self.frontend.epoch, self.frontend.oldest_epoch, True)
        )
        self.frontends.begin(state.release)
        self.frontends.directory(self.present)
        self.cluster = EndlessNodes(self.nodes)
        planner, drain_s = Planner(self.layers, self.config.placement, on_this_machine=True), self.config.server.drain_timeout_s
        self.controller = Controller(planner, state, self.cluster, self, self.frontends, lambda _: None, drain_s)

    async def open_control(self, port: int = 0) -> None:
        """Lets frontends follow with the token "follow", from `control_target` on."""
        address = controller_address(self.config.server, self.config.controller).model_copy(update={"port": port})
        control = Control(self.frontends, frontend_tokens(self.config.controller, "follow"))
        self.control_server = GrpcServer(address, self.metrics.observe_call, admin=self.controller, control=control)
        self.control_target = f"127.0.0.1:{await self.control_server.start()}"

    async def close_control(self) -> None:
        """As a controller that is killed."""
        await self.control_server.stop()

    async def reopen_control(self) -> None:
        """As a controller that has been started again: it knows what is served, and the keys it wrote down."""
        self._begin(self.controller.state, self._followers)
        await self.open_control(int(self.control_target.rpartition(":")[2]))

    async def _admit(self, keys: frozenset[str]) -> None:
        self._followers = keys
        self.introduce()

    def _admitted(self) -> frozenset[str]:
        return self._followers | {self._keys.public}

    @property
    def present(self) -> dict[int, HostInfo]:
        return {host.number: host.info for host in self.hosts if host.is_up}

    async def find(self, number: int) -> HostInfo:
        return await next(host for host in self.hosts if host.number == number).find()

    def _add(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            node = self.nodes[number] if number < len(self.nodes) else self.nodes[0]
            host = ThreadedHost(number, self._kind, self._folder, self.config, self._releases, node, self._admitted, self.introduce)
            self.hosts.append(host)
        self.introduce()

    async def take(self, release: Release, assignments: Sequence[Assignment]) -> None:
        self._releases.append(release)
        self._add([number for number in release.placement.hosts if number not in {host.number for host in self.hosts}])
        for host in self.hosts:
            if host.number in release.placement.hosts:
                await host.find()
                await asyncio.to_thread(host.holdings.take, release)

    async def withdraw(self, epoch: int) -> None:
        self._releases[:] = [release for release in self._releases if release.epoch < epoch]
        for host in self.hosts:
            host.holdings.withdraw(epoch)

    async def retire(self, epoch: int) -> None:
        self._releases[:] = [release for release in self._releases if release.epoch >= epoch]
        for host in self.hosts:
            host.holdings.retire(epoch)

    async def remove(self, numbers: Sequence[int]) -> None:
        for host in [host for host in self.hosts if host.number in numbers]:
            self.hosts.remove(host)
            if host.is_up:
                await asyncio.to_thread(host.stop)

    def introduce(self) -> None:
        """Every host learns where all of them are now."""
        directory = {host.number: host.info for host in self.hosts}
        for host in self.hosts:
            host.meet(directory)
        if hasattr(self, "frontends"):
            self._loop.call_soon_threadsafe(self.frontends.directory, directory)

    def _on_health(self, layer: int, healthy: bool) -> None:
        self.server.set_serving(layer, healthy)
