"""Changing what a running service serves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, TypeVar

from moeserve.api.find_layer import check_layer
from moeserve.client.connection import ADMINISTERING, TLS, Reach
from moeserve.client.line import Line
from moeserve.errors import InvalidRequest
from moeserve.observe.audit import AuditEvent
from moeserve.observe.records import read
from moeserve.observe.status import Rebalanced, ServiceStatus
from moeserve.v1 import admin_service_pb2 as pb
from moeserve.v1 import admin_service_pb2_grpc as pb_grpc

R = TypeVar("R")


@dataclass(frozen=True)
class _Nothing:
    """An empty answer."""


@dataclass(frozen=True)
class Swapped:
    """epoch: of the placement in force; model_revision: of the layer's answers from now on."""

    epoch: int
    model_revision: int


@dataclass(frozen=True)
class Placed:
    """epoch: of the placement in force; hosts: the names of its hosts."""

    epoch: int
    hosts: tuple[str, ...]

    def __str__(self) -> str:
        return f"epoch {self.epoch}: the experts are on {', '.join(self.hosts)}"


@dataclass(frozen=True)
class Ping:
    """The process that answers: `role` is service, frontend or controller; `reason`: why it is not ready."""

    role: str
    version: str
    epoch: int
    is_ready: bool
    reason: str


class AdminClient:
    """One connection to the AdminService at `target` ("host:port"), with the admin token; tls as for `Client`. It never asks a proxy.

    Every call raises the MoEServeError the service raised.
    """

    def __init__(self, target: str, token: str, tls: TLS | bool | None = None) -> None:
        self._line = Line(Reach(target, token, tls, None, ADMINISTERING), pb_grpc.AdminServiceStub)

    def ping(self, timeout: float | None = 5.0) -> Ping:
        """Which process answers, and whether it is ready; frontends answer, too. A caller's token is enough."""
        return self._ask(Ping, "Ping", timeout)

    def status(self, timeout: float = 30.0) -> ServiceStatus:
        """Hosts, frontends and layers, now."""
        return self._ask(ServiceStatus, "GetPlacement", timeout)

    def swap(self, layer: int | str, checkpoint: str | Path, experts: Iterable[int] = (), timeout: float = 3600.0) -> Swapped:
        """Serve `layer` (position or name; "" = all), or only these `experts` of it, with the weights of another folder of the model.

        `checkpoint` is an absolute path where the service and its hosts run. Returns when no request gets the old weights any more.
        """
        return self._ask(Swapped, "SwapExperts", timeout, **_which(layer), checkpoint=str(checkpoint), experts=list(experts))

    def scale(self, hosts: int | Literal["all"], timeout: float = 3600.0) -> Placed:
        """Change the number of hosts; "all" = as many as fit on the nodes.

        Returns when new hosts serve and removed hosts are gone.
        """
        return self._ask(Placed, "Scale", timeout, **({"all": True} if hosts == "all" else {"hosts": hosts}))

    def scale_copies(self, copies: int, layer: int | str = "", expert: int | None = None, timeout: float = 3600.0) -> Placed:
        """So many copies of `expert` of `layer` (its position or name), each on another host; None = of every expert, "" = of every layer.

        They take the place of placement.copies. Returns when they are in force.
        """
        which = {} if expert is None else {"expert": expert}
        return self._ask(Placed, "ScaleCopies", timeout, **_which(layer), copies=copies, **which)

    def rebalance(self, *, dry_run: bool = False, timeout: float = 3600.0) -> Rebalanced:
        """One round of balancing now, or only what it would move."""
        return self._ask(Rebalanced, "Rebalance", timeout, dry_run=dry_run)

    def events(self, *, follow: bool = False, timeout: float | None = None) -> Iterator[AuditEvent]:
        """The audit log, the oldest first; with `follow` also what is changed from now on, until the service ends.

        It is asked when the first event is asked for. What is not read is not sent; a reader that stays too far behind misses events.
        """
        with self._line.call(timeout) as call:
            stream = call.stubs.Events(pb.EventsRequest(follow=follow), timeout=call.timeout_s, metadata=self._line.reach.metadata)
            try:
                for message in stream:
                    yield read(AuditEvent, message)
            finally:
                stream.cancel()

    def drain(self, host: str, timeout: float = 3600.0) -> Placed:
        """Move the experts of a host to the others, then remove it."""
        return self._ask(Placed, "DrainHost", timeout, host=host)

    def shutdown(self, timeout: float = 30.0) -> None:
        """End the service as SIGTERM does; returns at once, while running requests finish."""
        self._ask(_Nothing, "Shutdown", timeout)

    def _ask(self, kind: type[R], method: str, timeout: float | None, **fields: object) -> R:
        """The answer of a method of the service, as a record. Raises InvalidRequest for a value that a field cannot hold."""
        try:
            request = getattr(pb, f"{method}Request")(**fields)
        except (TypeError, ValueError) as error:
            given = ", ".join(f"{name} = {value!r:.80}" for name, value in fields.items())
            raise InvalidRequest(f"{given} cannot be sent: {error}") from None
        with self._line.call(timeout) as call:
            return read(kind, getattr(call.stubs, method)(request, timeout=call.timeout_s, metadata=self._line.reach.metadata))

    def close(self) -> None:
        """Closes the connection."""
        channel = self._line.close()
        if channel is not None:
            channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _which(layer: int | str) -> dict[str, object]:
    """The fields of a request that say which layer. Raises InvalidRequest."""
    check_layer(layer)
    # A service that does not know layer_index must not take a layer without a name for all of them.
    return {"layer": layer} if isinstance(layer, str) else {"layer": str(layer), "layer_index": layer}
