"""The process of a frontend that a controller starts."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable

from moeserve.client import TLS
from moeserve.cluster.ray_where import this_node
from moeserve.config import ServiceConfig
from moeserve.programs import process
from moeserve.programs.frontend import FrontendProgram
from moeserve.programs.grpc_orders import GrpcOrders

log = logging.getLogger(__name__)


class DeployedFrontend:
    """A `FrontendProgram` in an actor: it follows the controller that started it."""

    def __init__(self, config: ServiceConfig, name: str, controller: str, token: str, tell: Callable[[str], None]) -> None:
        self._config = config
        self._name = name
        self._controller = controller
        self._token = token
        self._tell = tell
        self._watch: asyncio.Task[None] | None = None
        self._frontend: FrontendProgram | None = None
        process.prepare()

    async def start(self) -> None:
        """Returns when every expert can be reached. Raises what `FrontendProgram.start` raises."""
        orders = GrpcOrders(self._controller, self._token, self._tls())
        self._frontend = FrontendProgram(self._config.server, orders, name=self._name, node=this_node(), progress=self._tell)
        await self._frontend.start(self._config.resilience.request_timeout_s)
        self._watch = asyncio.create_task(self._end_when_broken(self._frontend))

    async def stop(self) -> None:
        """As SIGTERM does."""
        assert self._frontend is not None and self._watch is not None, "a frontend that has started"
        self._watch.cancel()
        await self._frontend.stop()

    def describe(self) -> str:
        """host:port of the gRPC service."""
        assert self._frontend is not None, "a frontend that has started"
        return self._frontend.target

    def _tls(self) -> TLS | None:
        server = self._config.server
        if server.tls_cert is None:
            return None
        return TLS(ca=self._config.controller.control_ca or server.tls_cert, cert=server.tls_cert, key=server.tls_key)

    async def _end_when_broken(self, frontend: FrontendProgram) -> None:
        error = await frontend.broken
        log.error("this frontend failed; Ray restarts it: %s", error)
        os._exit(1)
