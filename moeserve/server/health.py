"""The standard health service: every layer by its name, the service as a whole, and the liveness of the process.

gRPC's own servicer tells watchers one after the other, so a watcher that does not read would block all others.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Final

import grpc
from grpc_health.v1 import health_pb2 as pb

from moeserve.errors import UnknownLayer
from moeserve.loops import Notifier
from moeserve.server.rpc import Context

HEALTH_SERVICE_NAME: Final = pb.DESCRIPTOR.services_by_name["Health"].full_name
#: SERVING as long as this process answers and does not drain, even without experts: for a supervisor that would restart it
LIVENESS: Final = "moeserve.v1.liveness"

_UNKNOWN, _SERVING, _NOT_SERVING = (
    pb.HealthCheckResponse.SERVICE_UNKNOWN,
    pb.HealthCheckResponse.SERVING,
    pb.HealthCheckResponse.NOT_SERVING,
)


class Health:
    """A layer is NOT_SERVING until told otherwise; "" and the services' names are SERVING while every layer is, `LIVENESS` always.

    `layers` = None: they are not known yet, so nothing is SERVING.
    """

    def __init__(self, services: Sequence[str], layers: Iterable[str] | None) -> None:
        self._services = frozenset(("", *services))
        self._layers = None if layers is None else dict.fromkeys(layers, False)
        self._is_draining = False
        self._changed = Notifier()

    def handlers(self) -> grpc.GenericRpcHandler:
        """Handlers for any number of servers."""
        parse, serialize = pb.HealthCheckRequest.FromString, pb.HealthCheckResponse.SerializeToString
        return grpc.method_handlers_generic_handler(
            HEALTH_SERVICE_NAME,
            {
                "Check": grpc.unary_unary_rpc_method_handler(self.check, parse, serialize),
                "Watch": grpc.unary_stream_rpc_method_handler(self.watch, parse, serialize),
            },
        )

    def set_layers(self, layers: Iterable[str]) -> None:
        """Sets the names of the layers."""
        self._layers = dict.fromkeys(layers, False)
        self._changed.notify()

    def set_serving(self, layer: str, serving: bool) -> None:
        """Sets the state of one layer, and notifies watchers of it and of the whole."""
        assert self._layers is not None and layer in self._layers, f"{layer} is not a served layer"
        self._layers[layer] = serving
        self._changed.notify()

    def why_not_serving(self, layer: str = "") -> str:
        """Why a layer, or the service as a whole, is not SERVING, in one sentence; "" = it is."""
        if self._is_draining:
            return "it is draining"
        if self._layers is None:
            return "it is starting and does not yet know what to serve"
        missing = [name for name, is_serving in self._layers.items() if not is_serving and layer in ("", name)]
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        return f"experts without a live copy in {missing[0]}{more}" if missing else ""

    def drain(self) -> None:
        """Everything is NOT_SERVING from now on, whatever is set later."""
        self._is_draining = True
        self._changed.notify()

    async def check(self, request: pb.HealthCheckRequest, _context: Context) -> pb.HealthCheckResponse:
        """The state of a layer or service, now."""
        status = self._status(request.service)
        if status == _UNKNOWN:
            raise UnknownLayer(f"there is no health of {request.service[:80]!r}; allowed: names of services and layers")
        return pb.HealthCheckResponse(status=status)

    async def watch(self, request: pb.HealthCheckRequest, _context: Context) -> AsyncIterator[pb.HealthCheckResponse]:
        """The same, now and after every change; a slow watcher gets only the latest."""
        told = None
        while True:
            status = self._status(request.service)
            if status != told:
                told = status
                yield pb.HealthCheckResponse(status=status)
            else:
                await self._changed.wait()

    def _status(self, name: str) -> pb.HealthCheckResponse.ServingStatus:
        layers = self._layers or {}
        if name in layers:
            is_serving = layers[name]
        elif name in self._services:
            is_serving = self._layers is not None and all(layers.values())
        elif name == LIVENESS:
            is_serving = True
        else:
            return _UNKNOWN
        return _SERVING if is_serving and not self._is_draining else _NOT_SERVING
