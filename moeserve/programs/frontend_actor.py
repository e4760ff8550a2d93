"""What the process of a frontend does that a controller has started."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable

import torch

from moeserve.allocator import give_back_when_quiet, keep_large_blocks
from moeserve.client import TLS
from moeserve.cluster.ray_where import this_node
from moeserve.config import ServiceConfig
from moeserve.programs.frontend_service import FrontendService
from moeserve.transport import give_back_pools

log = logging.getLogger(__name__)


class FrontendProgram:
    """A `FrontendService` that follows the controller which has started it."""

    def __init__(self, config: ServiceConfig, name: str, controller: str, token: str, tell: Callable[[str], None]) -> None:
        self._config = config
        self._name = name
        self._controller = controller
        self._token = token
        self._tell = tell
        self._watch: asyncio.Task[None] | None = None
        self._service: FrontendService | None = None
        torch.set_num_threads(1)
        keep_large_blocks()
        give_back_when_quiet(give_back_pools)

    async def start(self) -> None:
        """Until every expert can be reached. Raises what `FrontendService.start` raises."""
        self._service = FrontendService(
            self._controller,
            self._token,
            self._config.server,
            tls=self._tls(),
            name=self._name,
            node=this_node(),
            progress=self._tell,
        )
        await self._service.start(self._config.resilience.request_timeout_s)
        self._watch = asyncio.create_task(self._end_when_broken(self._service))

    async def stop(self) -> None:
        """As SIGTERM does."""
        assert self._service is not None and self._watch is not None, "a frontend that has started"
        self._watch.cancel()
        await self._service.stop()

    def describe(self) -> str:
        """host:port of the gRPC service."""
        assert self._service is not None, "a frontend that has started"
        return self._service.target

    def _tls(self) -> TLS | None:
        server = self._config.server
        if server.tls_cert is None:
            return None
        return TLS(ca=self._config.controller.control_ca or server.tls_cert, cert=server.tls_cert, key=server.tls_key)

    async def _end_when_broken(self, service: FrontendService) -> None:
        error = await service.broken
        log.error("this frontend cannot go on; Ray starts it again: %s", error)
        os._exit(1)
