"""Requests, answers and refusals seen by generated code only, as by any client in any language."""

from __future__ import annotations

import grpc
import pytest
import torch
from grpc_status import rpc_status

from moeserve.api.tensors import WIRE_DTYPES, WIRE_NUMBERS, raw
from moeserve.v1 import moe_service_pb2 as pb
from moeserve.v1 import tensor_pb2
from tests.support.engine import HIDDEN
from tests.support.servers import Running


def tensor(value: torch.Tensor) -> tensor_pb2.Tensor:
    return tensor_pb2.Tensor(dtype=WIRE_NUMBERS[value.dtype], shape=value.shape, data=raw(value).tobytes())


def value(message: tensor_pb2.Tensor) -> torch.Tensor:
    return torch.frombuffer(bytearray(message.data), dtype=WIRE_DTYPES[message.dtype]).view(list(message.shape))


def tokens(count: int = 3, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.arange(count * HIDDEN, dtype=torch.float32).view(count, HIDDEN).to(dtype)


def request(hidden_states: torch.Tensor | None = None, layer: int | str | None = 0, **more: object) -> pb.ForwardRequest:
    message = pb.ForwardRequest(hidden_states=tensor(tokens() if hidden_states is None else hidden_states), **more)
    if isinstance(layer, int):
        message.layer_index = layer
    elif layer is not None:
        message.layer_name = layer
    return message


async def refused(running: Running, message: pb.ForwardRequest) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await running.stub.Forward(message)
    return caught.value


def detail(error: grpc.aio.AioRpcError, kind: type) -> object:
    status = rpc_status.from_call(error)
    assert status is not None
    found = kind()
    assert any(packed.Unpack(found) for packed in status.details), status
    return found
