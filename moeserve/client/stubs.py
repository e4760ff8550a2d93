"""The methods that a client calls on a channel, blocking or asyncio's."""

from __future__ import annotations

from typing import Any

from grpc_health.v1 import health_pb2_grpc

from moeserve.client.connection import SERVICE_NAME
from moeserve.v1 import moe_service_pb2_grpc as pb_grpc


class ServiceStubs:
    """MoEService and its health. Forward messages are bytes: tensors go through our own codec."""

    def __init__(self, channel: Any) -> None:
        self.forward = channel.unary_unary(f"/{SERVICE_NAME}/Forward")
        self.forward_many = channel.unary_unary(f"/{SERVICE_NAME}/ForwardMany")
        self.forward_stream = channel.stream_stream(f"/{SERVICE_NAME}/ForwardStream")
        service: Any = pb_grpc.MoEServiceStub(channel)  # type: ignore[no-untyped-call]
        self.open_memory = service.OpenMemory
        self.list_layers, self.get_stats = service.ListLayers, service.GetStats
        self.check_health = health_pb2_grpc.HealthStub(channel).Check
