"""`moeserve.v1.AdminService`: changing what is served.

A verb is a method of the service in the .proto file, the method of that name here, one of `AdminClient`, and a file in `cli/`.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, Protocol

import grpc

from moeserve.errors import InvalidRequest
from moeserve.files.version import running_version
from moeserve.observe.audit import AuditEvent
from moeserve.observe.records import to_message
from moeserve.observe.status import Rebalanced, ServiceStatus
from moeserve.server.rpc import Context
from moeserve.v1 import admin_service_pb2 as pb

_SERVICE: Final = pb.DESCRIPTOR.services_by_name["AdminService"]
_METHODS: Final = _SERVICE.methods
#: of hosts, in one sentence
_MAX_NAMES: Final = 8
ADMIN_SERVICE_NAME: Final = _SERVICE.full_name


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


class Audit(Protocol):
    """What was changed."""

    def events(self, until: asyncio.Event | None = None) -> AsyncGenerator[AuditEvent]:
        """The oldest first; then new ones, until that is set."""
        ...


class Admin(Protocol):
    """What can change the service: the controller."""

    @property
    def audit(self) -> Audit:
        """The log of what it has changed."""
        ...

    def status(self) -> ServiceStatus:
        """What is deployed and where, now."""
        ...

    def layer_name(self, layer: int) -> str:
        """The name of the layer at a position. Raises UnknownLayer."""
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

    async def scale_copies(self, layer: str, expert: int | None, copies: int) -> Served:
        """Another number of copies. Raises MoEServeError; then nothing has changed."""
        ...

    async def rebalance(self, dry_run: bool) -> Rebalanced:
        """One round of balancing, or only its plan. Raises MoEServeError."""
        ...

    def ask_to_stop(self) -> None:
        """Ask the process that runs the service to end it."""
        ...


@dataclass(frozen=True)
class Identity:
    """Role of a process; `epoch` and `why_not_ready` ("" = ready) are functions, called for every ping."""

    role: Literal["service", "frontend", "controller"]
    epoch: Callable[[], int]
    why_not_ready: Callable[[], str]


class PingService:
    """The method of AdminService that every process answers, without the admin token; handlers for all methods defined here."""

    def __init__(self, identity: Identity) -> None:
        self._identity = identity

    def handlers(self) -> grpc.GenericRpcHandler:
        """Handlers for a server."""
        found = {method: getattr(self, _snake(method.name), None) for method in _METHODS}
        handlers = {
            method.name: (grpc.unary_stream_rpc_method_handler if method.server_streaming else grpc.unary_unary_rpc_method_handler)(
                handler, getattr(pb, method.input_type.name).FromString, getattr(pb, method.output_type.name).SerializeToString
            )
            for method, handler in found.items()
            if handler is not None
        }
        return grpc.method_handlers_generic_handler(ADMIN_SERVICE_NAME, handlers)

    async def ping(self, _request: pb.PingRequest, _context: Context) -> pb.PingResponse:
        """Role, version, epoch and readiness, at once."""
        who, reason = self._identity, self._identity.why_not_ready()
        return pb.PingResponse(role=who.role, version=running_version(), epoch=who.epoch(), is_ready=not reason, reason=reason)


class AdminService(PingService):
    """Handlers that raise MoEServeError; the `Boundary` around them checks the admin token. `draining`: the service ends."""

    def __init__(self, identity: Identity, admin: Admin, draining: asyncio.Event) -> None:
        super().__init__(identity)
        self._admin, self._draining = admin, draining

    async def get_placement(self, _request: pb.GetPlacementRequest, _context: Context) -> pb.GetPlacementResponse:
        """A `ServiceStatus`, at once."""
        return to_message(pb.GetPlacementResponse, self._admin.status())

    async def swap_experts(self, request: pb.SwapExpertsRequest, _context: Context) -> pb.SwapExpertsResponse:
        """One `SwapExpertsRequest`; returns when no request gets the old weights any more."""
        if not Path(request.checkpoint).is_absolute():
            raise InvalidRequest(f"checkpoint is {request.checkpoint!r}; allowed: the absolute path of a folder", "checkpoint")
        layer = self._layer(request)
        served = await self._admin.swap(layer, Path(request.checkpoint), list(request.experts) or None)
        return pb.SwapExpertsResponse(epoch=served.epoch, model_revision=served.revision(layer))

    async def scale(self, request: pb.ScaleRequest, _context: Context) -> pb.ScaleResponse:
        """One `ScaleRequest`; returns when the service has that many hosts."""
        served = await self._admin.scale("all" if request.all else request.hosts)
        return pb.ScaleResponse(epoch=served.epoch, hosts=served.host_names)

    async def scale_copies(self, request: pb.ScaleCopiesRequest, _context: Context) -> pb.ScaleCopiesResponse:
        """One `ScaleCopiesRequest`; returns when the copies are in force."""
        expert = request.expert if request.HasField("expert") else None
        served = await self._admin.scale_copies(self._layer(request), expert, request.copies)
        return pb.ScaleCopiesResponse(epoch=served.epoch, hosts=served.host_names)

    async def rebalance(self, request: pb.RebalanceRequest, _context: Context) -> pb.RebalanceResponse:
        """A `Rebalanced`, when it is in force."""
        return to_message(pb.RebalanceResponse, await self._admin.rebalance(request.dry_run))

    async def events(self, request: pb.EventsRequest, _context: Context) -> AsyncIterator[pb.AuditEvent]:
        """The audit log; one that is followed ends well when the service does."""
        async with aclosing(self._admin.audit.events(self._draining if request.follow else None)) as events:
            async for event in events:
                yield to_message(pb.AuditEvent, event)

    async def drain_host(self, request: pb.DrainHostRequest, _context: Context) -> pb.DrainHostResponse:
        """One `DrainHostRequest`; returns when the host has gone."""
        served = await self._admin.drain(request.host)
        return pb.DrainHostResponse(epoch=served.epoch, hosts=served.host_names)

    async def shutdown(self, _request: pb.ShutdownRequest, _context: Context) -> pb.ShutdownResponse:
        """Answers at once; the service then ends as after SIGTERM."""
        self._admin.ask_to_stop()
        return pb.ShutdownResponse()

    def _layer(self, request: pb.SwapExpertsRequest | pb.ScaleCopiesRequest) -> str:
        """The name of the layer that is meant, which may be none of those that are served; "" = every layer."""
        return self._admin.layer_name(request.layer_index) if request.HasField("layer_index") else request.layer


def why_incomplete(status: ServiceStatus) -> str:
    """Why a controller is not ready: one sentence; "" = all wanted hosts are up."""
    down = [host.name for host in status.hosts if not host.is_up]
    return status.shortage or (f"{len(down)} of {len(status.hosts)} hosts are down: {', '.join(down[:_MAX_NAMES])}" if down else "")


def _snake(name: str) -> str:
    """GetPlacement -> get_placement."""
    return re.sub("(?<=[a-z])(?=[A-Z])", "_", name).lower()
