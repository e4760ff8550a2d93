"""`moeserve.v1.AdminService`: changing what is served."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal, Protocol

import grpc

from moeserve.errors import InvalidRequest
from moeserve.observe.records import to_message
from moeserve.observe.status import ServiceStatus
from moeserve.server.rpc import Context
from moeserve.v1 import admin_service_pb2 as pb

ADMIN_SERVICE_NAME: Final = pb.DESCRIPTOR.services_by_name["AdminService"].full_name


class Served(Protocol):
    """What is served after a change."""

    @property
    def epoch(self) -> int:
        """Of the release in force."""
        ...

    @property
    def host_names(self) -> Sequence[str]:
        """Names of the hosts that have experts."""
        ...

    def revision(self, layer: str) -> int:
        """The `model_revision` of a layer; "" = the highest of all."""
        ...


class Admin(Protocol):
    """Whoever can change what is served."""

    def status(self) -> ServiceStatus:
        """What is deployed and where, now."""
        ...

    async def swap(self, layer: str, checkpoint: Path, experts: Sequence[int] | None) -> Served:
        """New weights for a layer ("" = every layer) or some of its experts. Raises MoEServeError; then nothing has changed."""
        ...

    async def scale(self, num_hosts: int | Literal["all"]) -> Served:
        """Another number of hosts, or as many as there is room for. Raises MoEServeError; then nothing has changed."""
        ...

    async def drain(self, host: str) -> Served:
        """One host fewer. Raises MoEServeError; then nothing has changed."""
        ...

    def ask_to_stop(self) -> None:
        """Tell whoever runs the service that it shall end."""
        ...


class AdminService:
    """Handlers that raise MoEServeError; the `Boundary` around them asks for the admin token."""

    def __init__(self, admin: Admin) -> None:
        self._admin = admin

    def handlers(self) -> grpc.GenericRpcHandler:
        """To add to a server."""
        methods: dict[str, tuple[Any, Any, Any]] = {
            "GetPlacement": (self.get_placement, pb.GetPlacementRequest, pb.GetPlacementResponse),
            "SwapExperts": (self.swap_experts, pb.SwapExpertsRequest, pb.SwapExpertsResponse),
            "Scale": (self.scale, pb.ScaleRequest, pb.ScaleResponse),
            "DrainHost": (self.drain_host, pb.DrainHostRequest, pb.DrainHostResponse),
            "Shutdown": (self.shutdown, pb.ShutdownRequest, pb.ShutdownResponse),
        }
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(method, request.FromString, response.SerializeToString)
            for name, (method, request, response) in methods.items()
        }
        return grpc.method_handlers_generic_handler(ADMIN_SERVICE_NAME, handlers)

    async def get_placement(self, _request: pb.GetPlacementRequest, _context: Context) -> pb.GetPlacementResponse:
        """A `ServiceStatus`, at once."""
        return to_message(pb.GetPlacementResponse, self._admin.status())

    async def swap_experts(self, request: pb.SwapExpertsRequest, _context: Context) -> pb.SwapExpertsResponse:
        """One `SwapExpertsRequest`; returns when no request is answered with the old weights any more."""
        if not Path(request.checkpoint).is_absolute():
            raise InvalidRequest(f"checkpoint is {request.checkpoint!r}; allowed: the absolute path of a folder", "checkpoint")
        served = await self._admin.swap(request.layer, Path(request.checkpoint), list(request.experts) or None)
        return pb.SwapExpertsResponse(epoch=served.epoch, model_revision=served.revision(request.layer))

    async def scale(self, request: pb.ScaleRequest, _context: Context) -> pb.ScaleResponse:
        """One `ScaleRequest`; returns when the hosts are as many as asked for."""
        served = await self._admin.scale("all" if request.all else request.hosts)
        return pb.ScaleResponse(epoch=served.epoch, hosts=served.host_names)

    async def drain_host(self, request: pb.DrainHostRequest, _context: Context) -> pb.DrainHostResponse:
        """One `DrainHostRequest`; returns when the host has gone."""
        served = await self._admin.drain(request.host)
        return pb.DrainHostResponse(epoch=served.epoch, hosts=served.host_names)

    async def shutdown(self, _request: pb.ShutdownRequest, _context: Context) -> pb.ShutdownResponse:
        """Answers at once; the service then ends as after SIGTERM."""
        self._admin.ask_to_stop()
        return pb.ShutdownResponse()
