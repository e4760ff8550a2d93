"""The standard health service: every layer by its name, the service as a whole, and whether the process lives."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio

#: SERVING as long as this process answers and does not drain, whatever becomes of experts: for who would restart it
LIVENESS: Final = "moeserve.v1.liveness"


class Health:
    """A layer is NOT_SERVING until told otherwise; "" and the services' names are SERVING while every layer is, `LIVENESS` always.

    `layers` = None: they are not known yet, so nothing is SERVING.
    """

    def __init__(self, services: Sequence[str], layers: Iterable[str] | None) -> None:
        self._services = services
        self._layers = None if layers is None else dict.fromkeys(layers, False)
        self._servicer = aio.HealthServicer()
        self._publishing: set[asyncio.Task[None]] = set()

    async def add_to(self, server: grpc.aio.Server) -> None:
        """Registers the service, on as many servers as are to tell; to be called before they start."""
        await self._publish()
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)

    def set_layers(self, layers: Iterable[str]) -> None:
        """These are the layers."""
        self._layers = dict.fromkeys(layers, False)
        self._tell()

    def set_serving(self, layer: str, serving: bool) -> None:
        """The state of one layer; whoever watches it, or the whole, is told."""
        assert self._layers is not None and layer in self._layers, f"{layer} is not a served layer"
        self._layers[layer] = serving
        self._tell()

    def _tell(self) -> None:
        task = asyncio.get_running_loop().create_task(self._publish())
        self._publishing.add(task)
        task.add_done_callback(self._publishing.discard)

    async def drain(self) -> None:
        """Everything is NOT_SERVING from now on, whatever is set later."""
        await self._servicer.enter_graceful_shutdown()

    async def _publish(self) -> None:
        layers = self._layers or {}
        everything = self._layers is not None and all(layers.values())
        for name, serving in (dict.fromkeys(("", *self._services), everything) | layers | {LIVENESS: True}).items():
            status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
            await self._servicer.set(name, status)
