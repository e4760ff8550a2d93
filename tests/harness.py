"""A whole service in this process, without Ray: hosts in threads, real channels between them and the frontend, a real gRPC server."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

from moeserve.checkpoints import layer_sources, load_bank
from moeserve.config import load_config
from moeserve.experts import ExpertBank
from moeserve.frontend import Frontend
from moeserve.host import HostLoop
from moeserve.metrics import Metrics
from moeserve.placement import plan_placement
from moeserve.server import GrpcServer
from moeserve.stats import HostInfo
from moeserve.transport import KeyPair, listen

Result = TypeVar("Result")
Kind = Literal["local", "shm", "tcp"]
CHANNELS: tuple[Kind, ...] = ("local", "shm", "tcp")


class ThreadedHost:
    """One expert host in a thread; `restart` gives it a new endpoint, as a new process would have."""

    def __init__(self, number: int, kind: Kind, folder: Path, banks: Mapping[int, ExpertBank]) -> None:
        self.number, self._kind, self._folder, self._banks = number, kind, folder, banks
        self._incarnation = 0
        self._loop_of_service = asyncio.get_running_loop()
        self._up = asyncio.Event()
        self.start()

    def start(self) -> None:
        self._incarnation += 1
        name = f"host-{self.number}-{self._incarnation}"
        endpoint = {"local": f"local:{self._folder}/{name}", "shm": f"unix:{self._folder}/{name}.sock", "tcp": "tcp://127.0.0.1:0"}
        listener = listen(endpoint[self._kind])
        self.endpoint = listener.endpoints[0]
        self._loop = HostLoop(self._banks, listener)
        self._thread = threading.Thread(target=self._loop.run)
        self._thread.start()
        self.is_up = True
        self._loop_of_service.call_soon_threadsafe(self._up.set)

    def stop(self) -> None:
        self.is_up = False
        self._loop_of_service.call_soon_threadsafe(self._up.clear)
        self._loop.stop()
        self._thread.join()

    async def find(self) -> HostInfo:
        await self._up.wait()
        return HostInfo(f"host-{self.number}", self.endpoint, "", "this-node", 0, "cpu", "", 1, 0)


class ServiceHarness:
    """`with ServiceHarness(config, kind, tmp_path) as service: Client(service.target)`."""

    def __init__(self, config: Mapping[str, Any], kind: Kind, folder: Path) -> None:
        self.config = load_config({"server": {"port": 0}, **config})
        self.sources = layer_sources(self.config)
        specs = [source.spec for source in self.sources]
        self.metrics = Metrics(specs, self.config.observability.expert_detail)
        self.placement = plan_placement(specs, self.config.placement)
        self._kind, self._folder = kind, folder
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self.hosts: list[ThreadedHost] = []
        self.target = ""

    def call(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Run a coroutine on the service's loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=60)

    def __enter__(self) -> Self:
        self._thread.start()
        self.call(self._start())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.call(self.server.drain(5.0))
        self.call(self.frontend.close())
        for host in self.hosts:
            if host.is_up:
                host.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _start(self) -> None:
        for number in range(self.placement.num_hosts):
            banks = {
                layer: load_bank(source, held)
                for layer, source in enumerate(self.sources)
                if (held := self.placement.layers[layer].shards_on(number))
            }
            self.hosts.append(ThreadedHost(number, self._kind, self._folder, banks))
        found = [(f"host-{host.number}", host.find) for host in self.hosts]
        self.frontend = Frontend(
            self.sources, self.placement, found, self.config, self.metrics, "model", self._on_health, KeyPair.generate()
        )
        self.server = GrpcServer(self.frontend, self.config.server, self.metrics.observe_call)
        self.target = f"127.0.0.1:{await self.server.start()}"
        await self.frontend.start()

    def _on_health(self, layer: int, healthy: bool) -> None:
        self.server.set_serving(layer, healthy)
