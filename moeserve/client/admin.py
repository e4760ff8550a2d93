"""Changing what a running service serves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import grpc

from moeserve.client.connection import TLS, call_metadata, open_channel
from moeserve.client.failures import to_error
from moeserve.errors import InvalidRequest
from moeserve.standing import FrontendStanding, HostStanding, LayerStanding, Standing
from moeserve.stats import HostShards
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


class AdminClient:
    """One connection to the AdminService at `target` ("host:port"), with the admin token; tls as for `Client`.

    Every call raises the MoEServeError the service raised.
    """

    def __init__(self, target: str, token: str, tls: TLS | bool | None = None) -> None:
        self._target = target
        self._metadata = call_metadata(token)
        self._channel = open_channel(target, tls)
        self._service = pb_grpc.AdminServiceStub(self._channel)  # type: ignore[no-untyped-call]

    def status(self, timeout: float = 30.0) -> Standing:
        """What is deployed and where, now."""
        answer = self._call(self._service.GetPlacement, pb.GetPlacementRequest(), timeout)
        return _standing(answer)

    def swap(self, layer: str, checkpoint: str | Path, experts: Iterable[int] = (), timeout: float = 3600.0) -> Swapped:
        """Serve `layer` with the weights of another folder of the same model; only these `experts` of it if any are named.

        `checkpoint` is an absolute path where the service and its hosts run. Returns when no request gets the old weights any more.
        """
        request = _request(pb.SwapExpertsRequest, layer=layer, checkpoint=str(checkpoint), experts=list(experts))
        answer = self._call(self._service.SwapExperts, request, timeout)
        return Swapped(answer.epoch, answer.model_revision)

    def scale(self, hosts: int | Literal["all"], timeout: float = 3600.0) -> Placed:
        """Spread the experts over so many hosts, or over all that the nodes have room for.

        Returns when the new ones serve and those that left are gone.
        """
        request = pb.ScaleRequest(all=True) if hosts == "all" else _request(pb.ScaleRequest, hosts=hosts)
        answer = self._call(self._service.Scale, request, timeout)
        return Placed(answer.epoch, tuple(answer.hosts))

    def drain(self, host: str, timeout: float = 3600.0) -> Placed:
        """Place the experts of a host on the others, and let it go."""
        answer = self._call(self._service.DrainHost, _request(pb.DrainHostRequest, host=host), timeout)
        return Placed(answer.epoch, tuple(answer.hosts))

    def shutdown(self, timeout: float = 30.0) -> None:
        """End the service as SIGTERM does; returns at once, while running requests finish."""
        self._call(self._service.Shutdown, pb.ShutdownRequest(), timeout)

    def _call(self, method: Callable[..., Any], request: Any, timeout: float) -> Any:
        try:
            return method(request, timeout=timeout, metadata=self._metadata)
        except grpc.RpcError as failure:
            raise to_error(failure, self._target, timeout) from None

    def close(self) -> None:
        """Ends the connection."""
        self._channel.close()

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


def _standing(answer: pb.GetPlacementResponse) -> Standing:
    return Standing(
        epoch=answer.epoch,
        wanted_hosts=answer.wanted_hosts,
        is_changing=answer.is_changing,
        shortage=answer.shortage,
        hosts=[
            HostStanding(host.name, host.node, host.is_up, host.pid, host.device, host.cuda_visible_devices, host.weights_bytes)
            for host in answer.hosts
        ],
        frontends=[
            FrontendStanding(one.name, one.target, one.metrics_target, one.node, one.epoch, one.is_ready) for one in answer.frontends
        ],
        layers=[
            LayerStanding(
                layer.name,
                layer.model_revision,
                layer.tensor_parallel,
                [HostShards(held.host, tuple(held.experts), tuple(held.shards)) for held in layer.placement],
            )
            for layer in answer.layers
        ],
    )
