"""A frontend as a program: follows a controller, serves gRPC and metrics; needs no Ray."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from typing import Final

from moeserve.addresses import called, join
from moeserve.checkpoints import ServedLayers
from moeserve.config import ServerConfig
from moeserve.control.follow import Report, checked_name
from moeserve.control.orders import Orders
from moeserve.errors import ConfigError, number_of
from moeserve.frontend import Frontend
from moeserve.loops import in_thread
from moeserve.observe.metrics import Metrics
from moeserve.observe.page import OtherProcesses, StatusPage
from moeserve.programs.followed import Followed
from moeserve.server.admin import Admin
from moeserve.server.control import Control
from moeserve.server.grpc_server import GrpcServer
from moeserve.server.ports import require_free_ports
from moeserve.server.proxy import SharedPort

log = logging.getLogger(__name__)

#: where the process that has the controller reads the metrics of those that share its port
_PRIVATE: Final = "127.0.0.1"


class FrontendProgram:
    """`start` it, use `target`, `stop` it. When `broken` is done, it cannot continue: stop it.

    `server` says where it listens; `orders` say what it serves, and how. `node` is the Ray node of this process, if any: hosts
    there are reached through memory. `admin` and `control` belong to a controller in this process and are served on the same port; `layers`
    are the ones it has read. `shared`: this process is one more on a port that another has opened; it listens when it is ready.
    `others` has the metrics of such processes.
    """

    def __init__(
        self,
        server: ServerConfig,
        orders: Orders,
        *,
        name: str = "",
        node: str = "",
        admin: Admin | None = None,
        control: Control | None = None,
        layers: ServedLayers | None = None,
        shared: SharedPort | None = None,
        others: OtherProcesses | None = None,
        progress: Callable[[str], None] = log.info,
    ) -> None:
        self._server, self._progress = server, progress
        self._controller, self._host = orders.controller, called(server.host, orders.controller)
        report = Report(checked_name(name) or f"{socket.gethostname()}-{os.getpid()}", node=node)
        self._followed = Followed(server, orders, report, self, layers)
        self._grpc = GrpcServer(server, self._observe, is_starting=True, admin=admin, control=control, shared=shared)
        self._is_joining, self._others = shared is not None, others
        self._page: StatusPage | None = None
        self.broken = self._followed.broken
        #: host:port of the gRPC service, and of the metrics endpoint
        self.target = ""
        self.metrics_target = ""

    @property
    def frontend(self) -> Frontend:
        """The engine that answers requests, once it is known what to serve."""
        return self._followed.frontend

    @property
    def public_key(self) -> str:
        """Its key for hosts on other nodes, Z85; "" until a controller has given it keys."""
        return self._followed.follower.report.public_key

    @property
    def metrics(self) -> Metrics:
        """The metrics of this frontend, once it is known what to serve."""
        assert self._followed.metrics is not None, "a frontend that has been opened"
        return self._followed.metrics

    async def start(self, timeout_s: float = 60.0) -> None:
        """`open`, and wait until it is `ready`; after a failure everything is stopped again.

        Raises what these raise, and ConfigError when one of its ports is taken.
        """
        try:
            if not self._is_joining:
                await require_free_ports(self._server)
            await self.open(timeout_s)
            await self.ready()
        except BaseException:
            await self.stop()
            raise

    async def open(self, timeout_s: float = 60.0) -> None:
        """Listen, and wait until it is known what to serve. Health says NOT_SERVING, and requests wait for the hosts.

        Raises ServiceUnreachable when the controller was not reached within `timeout_s`, Unauthenticated or PermissionDenied when it
        refuses this frontend, ConfigError when this frontend cannot serve what it says.
        """
        self.target = join(self._host, self._server.port if self._is_joining else await self._grpc.start())
        self._followed.follower.say(target=self.target)
        if self._controller is not None:
            self._progress(f"following {self._controller.text}")
        await self._followed.open(timeout_s)

    async def ready(self) -> None:
        """Returns when every expert can be reached. Raises ConfigError when this frontend cannot serve what the controller says."""
        await self._followed.ready()
        if self._is_joining:
            await self._grpc.start()

    async def ailing(self) -> None:
        """Returns when some expert cannot be reached."""
        await self._followed.ailing()

    async def stop(self) -> None:
        """Refuse new requests, finish the running ones (at most server.drain_timeout_s), leave the controller, then stop everything."""
        self._followed.decline()
        await self._grpc.drain(self._server.drain_timeout_s)
        await self._followed.close()
        if self._page is not None:
            await in_thread(self._page.stop)

    async def hurry(self) -> None:
        """While `stop` waits for running requests: cancel them instead."""
        await self._grpc.stop()

    def enter(self, frontend: Frontend, metrics: Metrics, otlp_endpoint: str | None) -> None:
        """The follower calls it when it is known what to serve."""
        host, port = (_PRIVATE, 0) if self._is_joining else (self._server.host, self._server.metrics_port)
        if otlp_endpoint is not None:
            self._grpc.record_spans(otlp_endpoint)
        try:
            self._page = StatusPage(host, port, metrics.registry, frontend.stats, self._others)
        except OSError as error:
            raise ConfigError(f"server.host, server.metrics_port: cannot listen on {join(host, port)}: {error.strerror}") from None
        self.metrics_target = join(_PRIVATE if self._is_joining else self._host, self._page.port)
        self._followed.follower.say(metrics_target=self.metrics_target)
        metrics.queue_bytes.set_function(lambda: self._grpc.queue_bytes)
        self._grpc.serve(frontend)
        self._progress(f"serving {number_of(len(frontend.layers), 'layer')} of {frontend.model}")

    def health_changed(self, layer: int, healthy: bool) -> None:
        """As `Frontend` tells it."""
        self._grpc.set_serving(layer, healthy)

    def _observe(self, method: str, code: str, seconds: float) -> None:
        if (metrics := self._followed.metrics) is not None:
            metrics.observe_call(method, code, seconds)
