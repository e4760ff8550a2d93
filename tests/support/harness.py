"""A whole service in this process, without Ray: what ships, on a cluster of threads that a test may disturb."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import torch

from moeserve.checkpoints import LayerSource
from moeserve.cluster.thread_fleet import ThreadFleet
from moeserve.cluster.thread_host import ThreadHost
from moeserve.cluster.threads import ThreadCluster
from moeserve.config import ServedModel, ServiceConfig, load_config
from moeserve.control.controller import Controller
from moeserve.control.frontends import Frontends
from moeserve.control.saved import Saved
from moeserve.experts import ExpertBank
from moeserve.frontend import Frontend
from moeserve.host import Holdings, Host, Where
from moeserve.loops import LoopThread
from moeserve.observe.metrics import Metrics
from moeserve.observe.stats import HostInfo, host_name
from moeserve.placement import Placement
from moeserve.programs.controller import ControllerProgram
from moeserve.programs.serve import Service
from moeserve.server.control import Control
from moeserve.server.grpc_server import GrpcServer
from moeserve.server.security import controller_address, frontend_tokens
from tests.support.ports import kept_port

Result = TypeVar("Result")
Kind = Literal["local", "shm", "tcp"]
CHANNELS: tuple[Kind, ...] = ("local", "shm", "tcp")


class Killed(BaseException):
    """Raised by a bank under a test's hand: the host is gone, in the middle of a pass."""


class TestFleet(ThreadFleet):
    """Hosts fail for reasons that the test gives, too."""

    __test__ = False

    def __init__(self, where: Callable[[int, int], Where], hold: Callable[[int, Where], Holdings]) -> None:
        super().__init__(where, hold)
        #: why hosts that are down do not come back
        self.told_failing: dict[int, str] = {}

    @property
    def failing(self) -> dict[int, str]:
        return {**super().failing, **self.told_failing}

    def _make(self, number: int, on_crash: Callable[[], None]) -> Host:
        """In a thread of its own, wherever a test starts a host: a thread that has loaded experts stays nice."""
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(super()._make, number, on_crash).result()


class Counted:
    """In place of a bank table's `bank`: the loop asks it once for each message."""

    def __init__(self, holdings: Holdings) -> None:
        self.messages = 0
        self._bank, self._loop = holdings.bank_table.bank, host_name(holdings.number)

    def __call__(self, layer: int, epoch: int) -> ExpertBank | None:
        self.messages += threading.current_thread().name == self._loop
        return self._bank(layer, epoch)


def received(host: ThreadHost) -> int:
    """How many messages have reached this incarnation of a host."""
    counted: Any = host.host.holdings.bank_table.bank
    return int(counted.messages)


class TestCluster(ThreadCluster):
    """`names` says where each host is, and the frontend is on the first one's node; all are reached by `kind`, and over TCP."""

    __test__ = False

    def __init__(self, config: ServiceConfig, kind: Kind, folder: Path, names: Sequence[str]) -> None:
        super().__init__(config.only(ServedModel), config.placement, config.ray)
        self._kind, self._folder, self._names = kind, folder, names
        self.here = names[0]
        self.nodes.cpus = 1000
        self.hosts: TestFleet = TestFleet(self.where, self._hold)

    def _hold(self, number: int, where: Where) -> Holdings:
        holdings = super()._hold(number, where)
        holdings.bank_table.bank = Counted(holdings)  # type: ignore[method-assign]
        return holdings

    def where(self, number: int, incarnation: int) -> Where:
        name = f"host-{number}-{incarnation}"
        endpoint = {"local": f"local:{self._folder}/{name}", "shm": f"unix:{self._folder}/{name}.sock", "tcp": "tcp://127.0.0.1:0"}
        node = self._names[number] if number < len(self._names) else self._names[0]
        return Where(node, tuple(dict.fromkeys((endpoint[self._kind], endpoint["tcp"]))), torch.device("cpu"), 1)


class ServiceHarness:
    """`with ServiceHarness(config, kind, tmp_path) as service: Client(service.target)`.

    `nodes` says where each host is; the frontend is on the first host's node.
    """

    def __init__(self, config: Mapping[str, Any], kind: Kind, folder: Path, nodes: Sequence[str] = ()) -> None:
        self.config = load_config({**config, "server": {"port": 0, "metrics_port": 0, **config.get("server", {})}})
        self.cluster = TestCluster(self.config, kind, folder, nodes or ["this-node"])
        self._thread = LoopThread("service")
        self.control_server: GrpcServer | None = None
        self.control_target = ""

    def call(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Run a coroutine on the service's loop."""
        return self._thread.call(work, 60)

    def __enter__(self) -> Self:
        self._thread.start()
        try:
            self.call(self._start())
        except BaseException:
            self._thread.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if self.control_server is not None:
                self.call(self.control_server.stop())
            self.call(self.service.stop())
            self.call(self.program.stop())  # it may be a later one than that of the service
        finally:
            self._thread.stop()

    async def _start(self) -> None:
        self.service = Service(self.config, cluster=self.cluster)
        await self.service.start()
        for link in self.frontend._links.values():  # where experts have copies, a service is ready before
            await link.connected()
        self.program = self.service.program
        self.placement: Placement = self.controller.state.release.placement

    @property
    def target(self) -> str:
        return self.service.target

    @property
    def frontend(self) -> Frontend:
        return self.service.frontend.frontend

    @property
    def metrics(self) -> Metrics:
        return self.service.frontend.metrics

    @property
    def controller(self) -> Controller:
        return self.program.controller

    @property
    def frontends(self) -> Frontends:
        return self.program.frontends

    @property
    def sources(self) -> Sequence[LayerSource]:
        return self.program.layers.sources

    @property
    def hosts(self) -> list[ThreadHost]:
        return [member for _, member in sorted(self.cluster.hosts.members.items())]

    @property
    def given_up(self) -> set[int]:
        return self.cluster.hosts.given_up

    @property
    def failing(self) -> dict[int, str]:
        """Why hosts that are down do not come back, as the test says."""
        return self.cluster.hosts.told_failing

    @property
    def followers(self) -> frozenset[str]:
        """Public keys of frontends elsewhere that hosts let in."""
        return frozenset(self.program.saved.frontend_keys) - {self.service.frontend.public_key}

    def introduce(self) -> None:
        """Hosts and frontends hear of what hosts say of themselves now."""
        self._thread.soon(self.cluster.hosts._introduce)

    async def find(self, number: int) -> HostInfo:
        """Raises why it is not up: it tries once more first."""
        member = self.cluster.hosts.members[number]
        await self.cluster.hosts._until_up(member)
        return member.host.info

    @property
    def is_counting(self) -> bool:
        """Whether the controller knows where the counts of a frontend start: what callers ask from now on is demand."""
        return bool(self.controller._balancer._demand._new._counted)

    @property
    def heard(self) -> int:
        """How many choices of callers the controller has heard of, since its frontends started."""
        counted = self.controller._balancer._demand._new._counted
        return sum(int(layer.sum()) for counts in counted.values() for layer in counts)

    @property
    def present(self) -> Mapping[int, HostInfo]:
        return self.cluster.hosts.present

    async def open_control(self, port: int = 0) -> None:
        """Lets frontends follow with the token "follow", from `control_target` on."""
        address = controller_address(self.config.server, self.config.controller).model_copy(update={"port": port or kept_port()})
        control = Control(self.frontends, frontend_tokens(self.config.controller, "follow"))
        self.control_server = GrpcServer(address, self.metrics.observe_call, admin=self.controller, control=control)
        self.control_target = f"127.0.0.1:{await self.control_server.start()}"

    async def close_control(self) -> None:
        """As a controller that is killed."""
        assert self.control_server is not None
        await self.control_server.stop()

    async def reopen_control(self, service_id: str = "") -> None:
        """As a controller that has been started again: it knows what is served, and the keys it wrote down."""
        store = self.cluster.store
        saved = Saved.from_bytes(store.load() or b"")
        store.save(replace(saved, service_id=service_id or saved.service_id).to_bytes())
        killed, self.program = self.program, ControllerProgram(self.config, self.cluster, lambda _: None)
        await asyncio.gather(*killed._stop_tasks(), return_exceptions=True)
        await self.program.prepare(is_followed=True)
        self.service.orders.frontends = self.program.frontends
        for member in list(killed.frontends._members):
            killed.frontends._dismiss(member)
        await self.program.bring_up()
        await self.open_control(int(self.control_target.rpartition(":")[2]))
