"""Changing what a running service serves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from moeserve.client.connection import ADMINISTERING, TLS, Reach
from moeserve.client.line import Line
from moeserve.errors import InvalidRequest
from moeserve.observe.records import read
from moeserve.observe.status import ServiceStatus
from moeserve.v1 import admin_service_pb2 as pb
from moeserve.v1 import admin_service_pb2_grpc as pb_grpc


@dataclass(frozen=True)
class Swapped:
    """epoch: version of the placement in force; model_revision: what answers of the layer say now."""

    epoch: int
    model_revision: int


@dataclass(frozen=True)
class Placed:
    """epoch: version of the placement in force; hosts: their names."""

    epoch: int
    hosts: Sequence[str]

    def __str__(self) -> str:
        return f"epoch {self.epoch}: the experts stand on {', '.join(self.hosts)}"


class AdminClient:
    """One connection to the AdminService at `target` ("host:port"), with the admin token; tls as for `Client`. It never asks a proxy.

    Every call raises the MoEServeError the service raised.
    """

    def __init__(self, target: str, token: str, tls: TLS | bool | None = None) -> None:
        self._line = Line(Reach(target, token, tls, None, ADMINISTERING), pb_grpc.AdminServiceStub)

    def status(self, timeout: float = 30.0) -> ServiceStatus:
        """What is deployed and where, now."""
        return read(ServiceStatus, self._call("GetPlacement", pb.GetPlacementRequest(), timeout))

    def swap(self, layer: str, checkpoint: str | Path, experts: Iterable[int] = (), timeout: float = 3600.0) -> Swapped:
        """Serve `layer` ("" = every layer), or only these `experts` of it, with the weights of another folder of the same model.

        `checkpoint` is an absolute path where the service and its hosts run. Returns when no request gets the old weights any more.
        """
        request = _request(pb.SwapExpertsRequest, layer=layer, checkpoint=str(checkpoint), experts=list(experts))
        answer = self._call("SwapExperts", request, timeout)
        return Swapped(answer.epoch, answer.model_revision)

    def scale(self, hosts: int | Literal["all"], timeout: float = 3600.0) -> Placed:
        """Spread the experts over so many hosts, or over all that the nodes have room for.

        Returns when the new ones serve and those that left are gone.
        """
        request = pb.ScaleRequest(all=True) if hosts == "all" else _request(pb.ScaleRequest, hosts=hosts)
        answer = self._call("Scale", request, timeout)
        return Placed(answer.epoch, tuple(answer.hosts))

    def drain(self, host: str, timeout: float = 3600.0) -> Placed:
        """Place the experts of a host on the others, and let it go."""
        answer = self._call("DrainHost", _request(pb.DrainHostRequest, host=host), timeout)
        return Placed(answer.epoch, tuple(answer.hosts))

    def shutdown(self, timeout: float = 30.0) -> None:
        """End the service as SIGTERM does; returns at once, while running requests finish."""
        self._call("Shutdown", pb.ShutdownRequest(), timeout)

    def _call(self, method: str, request: Any, timeout: float) -> Any:
        with self._line.call(timeout) as call:
            return getattr(call.stubs, method)(request, timeout=call.timeout_s, metadata=self._line.reach.metadata)

    def close(self) -> None:
        """Ends the connection."""
        channel = self._line.close()
        if channel is not None:
            channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _request(kind: Callable[..., Any], **fields: object) -> Any:
    """Raises InvalidRequest for what a field cannot hold: a negative number, one of more than 32 bits."""
    try:
        return kind(**fields)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"{', '.join(f'{name} = {value!r:.80}' for name, value in fields.items())} cannot be sent: {error}") from None
