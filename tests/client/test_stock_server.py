"""Our clients against a server made of generated code and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
import torch
from google.rpc.status_pb2 import Status

from moeserve import errors
from moeserve.client import AsyncClient, Client, WireRequest
from moeserve.v1 import moe_service_pb2 as pb
from moeserve.v1 import moe_service_pb2_grpc as pb_grpc
from tests.support.messages import tensor

X = torch.randn(700, 64, generator=torch.Generator().manual_seed(0))


def echo(request: pb.ForwardRequest) -> pb.ForwardResponse:
    counts, num_tokens = tensor(torch.arange(4)), request.hidden_states.shape[0]
    return pb.ForwardResponse(
        request_id=request.request_id,
        hidden_states=request.hidden_states,
        requested=counts,
        processed=counts,
        dropped=counts,
        dropped_tokens=tensor(torch.zeros(num_tokens, dtype=torch.bool)),
        aux_loss=0.5,
        topk_ids=request.topk_ids if request.HasField("topk_ids") else None,
        topk_weights=request.topk_weights if request.HasField("topk_weights") else None,
    )


class Stock(pb_grpc.MoEServiceServicer):
    """Echoes; a request for a layer of some name fails in the way of that name."""

    def Forward(self, request: pb.ForwardRequest, context: Any) -> pb.ForwardResponse:
        if request.layer_name == "plain error":
            context.abort(grpc.StatusCode.NOT_FOUND, "not here")
        if request.layer_name == "foreign code":
            context.abort(grpc.StatusCode.OUT_OF_RANGE, "oh no")
        if request.layer_name == "another service":
            context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
        if request.layer_name == "another status":
            context.set_trailing_metadata([("grpc-status-details-bin", Status(code=9, message="x").SerializeToString())])
            context.abort(grpc.StatusCode.NOT_FOUND, "not here")
        if request.layer_name == "no status":
            context.set_trailing_metadata([("grpc-status-details-bin", b"\xff\xff")])
            context.abort(grpc.StatusCode.NOT_FOUND, "not here")
        if request.layer_name == "unavailable":
            context.abort(grpc.StatusCode.UNAVAILABLE, "closed")
        return pb.ForwardResponse() if request.layer_name == "empty answer" else echo(request)

    def ForwardStream(self, requests: Iterator[pb.ForwardRequest], context: Any) -> Iterator[pb.ForwardResponse]:
        return map(echo, requests)


@pytest.fixture
def target() -> Iterator[str]:
    limits = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    server = grpc.server(ThreadPoolExecutor(2), options=limits)
    pb_grpc.add_MoEServiceServicer_to_server(Stock(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [0, 1, 700])
async def test_tensors_survive(target: str, dtype: torch.dtype, num_tokens: int) -> None:
    x, ids, weights = X[:num_tokens].to(dtype), torch.randint(0, 4, (num_tokens, 2)), torch.rand(num_tokens, 2)
    with Client(target) as client:
        out = client.forward(x, topk_ids=ids, topk_weights=weights)
        (streamed,) = client.forward_stream([WireRequest(x, request_id="1")])
    async with AsyncClient(target) as async_client:
        again = await async_client.forward(x, topk_ids=ids, topk_weights=weights)
    for answer in (out, again):
        assert torch.equal(answer.hidden_states, x)
        assert answer.topk_ids is not None
        assert torch.equal(answer.topk_ids, ids)
        assert answer.topk_weights is not None
        assert torch.equal(answer.topk_weights, weights)
        assert (answer.requested.tolist(), answer.aux_loss, answer.z_loss) == ([0, 1, 2, 3], 0.5, 0.0)
    assert streamed.request_id == "1"
    assert torch.equal(streamed.result.hidden_states, x)


@pytest.mark.parametrize(
    ("layer", "kind", "sentence"),
    [
        ("plain error", errors.UnknownLayer, "^not here$"),
        ("foreign code", errors.MoEServeError, "^oh no$"),
        ("another status", errors.UnknownLayer, "^not here$"),
        ("no status", errors.UnknownLayer, "^not here$"),
        ("another service", errors.NotOffered, r"does not offer this method \(Method not found!\): in a deployed service"),
        ("unavailable", errors.ServiceUnreachable, "is unavailable: closed$"),
        ("empty answer", errors.MoEServeError, "the server's answer cannot be read"),
    ],
)
def test_failures_of_strangers_are_told_too(target: str, layer: str, kind: type[errors.MoEServeError], sentence: str) -> None:
    with Client(target) as client, pytest.raises(errors.MoEServeError, match=sentence) as caught:
        client.forward(X, layer=layer)
    assert type(caught.value) is kind


def test_a_call_that_a_stranger_does_not_know(target: str) -> None:
    with Client(target) as client, pytest.raises(errors.MoEServeError, match="Method not implemented"):
        client.layers()
