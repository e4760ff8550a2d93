"""The unary calls, seen by a client that is generated code and nothing else."""

from __future__ import annotations

import asyncio
import logging
import time

import grpc
import pytest
import torch
from google.rpc import error_details_pb2 as details

from moeserve import errors
from moeserve.v1 import moe_service_pb2 as pb
from moeserve.v1 import tensor_pb2
from tests.support.engine import EXPERTS, HIDDEN
from tests.support.messages import detail, refused, request, tensor, tokens, value
from tests.support.servers import Running
from tests.support.waiting import until_async

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("layer", "added"), [(0, 0), (1, 1), ("model.layers.3.mlp", 0), ("model.layers.5.mlp", 1)])
async def test_a_batch_comes_back_from_the_layer_it_named(running: Running, dtype: torch.dtype, layer: int | str, added: int) -> None:
    answer = await running.stub.Forward(request(tokens(dtype=dtype), layer, request_id="7"))
    assert torch.equal(value(answer.hidden_states), tokens(dtype=dtype) + added)
    assert value(answer.hidden_states).dtype == dtype
    assert (answer.request_id, answer.aux_loss, answer.z_loss) == ("7", 0.5, 0.25)
    assert value(answer.requested).tolist() == [1, 2, 3, 4]
    assert value(answer.processed).tolist() == [0, 1, 2, 3]
    assert value(answer.dropped).tolist() == [1, 1, 1, 1]
    assert not answer.HasField("topk_ids")
    assert running.observed == [("Forward", "OK")]


async def test_everything_a_request_says_reaches_the_engine(running: Running) -> None:
    used_token, ids, weights = torch.tensor([True, False, True]), torch.tensor([[0, 1], [2, 3], [3, 0]]), torch.rand(3, 2)
    message = request(model="tiny", used_token=tensor(used_token), topk_ids=tensor(ids), topk_weights=tensor(weights), return_routing=True)
    answer = await running.stub.Forward(message)
    assert value(answer.topk_ids).shape == (3, 2)
    assert value(answer.slots).tolist() == [[-1, -1]] * 3
    assert value(answer.drop_reasons).tolist() == [[pb.DROP_REASON_CAPACITY] * 2] * 3
    ((_, got),) = running.engine.requests
    assert torch.equal(got.hidden_states, tokens() * used_token[:, None])
    assert got.used_token is not None
    assert torch.equal(got.used_token, used_token)
    assert got.topk_ids is not None
    assert got.topk_ids.tolist() == [[0, 1], [-1, -1], [3, 0]]
    assert got.topk_weights is not None
    assert torch.equal(got.topk_weights, weights * used_token[:, None])
    assert got.return_routing
    assert (got.token_ids, got.capacity_factor, got.noise, got.seed) == (None, None, None, None)


async def test_what_a_request_changes_of_the_gate_reaches_the_engine(running: Running) -> None:
    ids = torch.tensor([0, 2**32 - 1, 5])
    await running.stub.Forward(request(layer=1, token_ids=tensor(ids), capacity_factor=1.2, noise="normal", seed=0))
    await running.stub.Forward(request(layer=1, capacity_factor=float("inf")))
    (_, got), (_, unlimited) = running.engine.requests
    assert got.token_ids is not None
    assert torch.equal(got.token_ids, ids)
    assert (got.capacity_factor, got.noise, got.seed) == (1.2, "normal", 0)
    assert (unlimited.token_ids, unlimited.capacity_factor, unlimited.noise, unlimited.seed) == (None, float("inf"), None, None)


@pytest.mark.parametrize("dtype", FLOATS)
async def test_an_empty_batch_is_answered_without_the_engine(running: Running, dtype: torch.dtype) -> None:
    answer = await running.stub.Forward(request(tokens(0, dtype), return_routing=True))
    assert (list(answer.hidden_states.shape), list(answer.topk_ids.shape)) == ([0, HIDDEN], [0, 2])
    assert (answer.slots.shape, answer.drop_reasons.shape, answer.drop_reasons.dtype) == ([0, 2], [0, 2], tensor_pb2.D_TYPE_INT32)
    assert value(answer.processed).tolist() == [0] * EXPERTS
    assert running.engine.requests == []


async def test_the_deadline_reaches_the_engine(running: Running) -> None:
    await running.stub.Forward(request(), timeout=20)
    deadline = running.engine.requests[0][1].deadline
    assert deadline is not None
    assert 0 < deadline - time.monotonic() < 21
    await running.stub.Forward(request())
    assert running.engine.requests[1][1].deadline is None


async def test_a_caller_that_leaves_cancels_the_work(running: Running) -> None:
    running.engine.gate.clear()
    call = running.stub.Forward(request())
    waiting = asyncio.ensure_future(call)
    await until_async(lambda: running.engine.requests)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await until_async(lambda: running.engine.cancelled == 1)
    assert await running.observed.until(1) == [("Forward", "CANCELLED")]


async def test_a_deadline_that_passes_cancels_the_work(running: Running) -> None:
    running.engine.gate.clear()

    async def has_begun() -> bool:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await running.stub.Forward(request(), timeout=0.3)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        return bool(running.engine.requests)

    await until_async(has_begun)
    await until_async(lambda: running.engine.cancelled == len(running.engine.requests))


@pytest.mark.parametrize(
    "raised",
    [
        errors.InvalidRequest("no"),
        errors.UnknownLayer("no"),
        errors.Overloaded("no"),
        errors.ExpertUnavailable("no"),
        errors.DeadlineExceeded("no"),
        errors.Cancelled("no"),
        errors.PermissionDenied("no"),
        errors.NonFiniteOutput("no"),
        errors.MoEServeError("no"),
    ],
)
async def test_every_error_keeps_its_status_and_sentence(running: Running, raised: errors.MoEServeError) -> None:
    running.engine.errors = [raised]
    error = await refused(running, request())
    assert (error.code(), error.details()) == (raised.code, "no")
    info = detail(error, details.ErrorInfo)
    assert isinstance(info, details.ErrorInfo)
    assert (info.reason, info.domain) == (type(raised).__name__, "moeserve")
    assert running.observed == [("Forward", raised.code.name)]


async def test_overload_says_when_to_try_again(running: Running) -> None:
    running.engine.errors = [errors.Overloaded("the queue is full")]
    error = await refused(running, request())
    retry, quota = detail(error, details.RetryInfo), detail(error, details.QuotaFailure)
    assert isinstance(retry, details.RetryInfo)
    assert retry.retry_delay.ToMilliseconds() > 0
    assert isinstance(quota, details.QuotaFailure)
    assert quota.violations[0].description == "the queue is full"


@pytest.mark.parametrize("raised", [ZeroDivisionError("secret"), asyncio.CancelledError("inside")])
async def test_our_own_mistakes_are_logged_and_told_without_details(
    running: Running, raised: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    running.engine.errors = [raised]
    with caplog.at_level(logging.ERROR, "moeserve"):
        error = await refused(running, request())
    assert (error.code(), error.details()) == (grpc.StatusCode.INTERNAL, "internal error; the server's log says more")
    assert [record.exc_info[1] for record in caplog.records if record.exc_info] == [raised]
    assert running.observed == [("Forward", "INTERNAL")]


@pytest.mark.parametrize("letter", ["l", "\u5c64", "%", "\udcff"], ids=["letters", "signs", "escaped", "no text"])
async def test_a_sentence_never_outgrows_the_metadata(letter: str, running: Running) -> None:
    """Of whatever it is made: names of files are bytes, which need not be text."""
    running.engine.errors = [errors.InvalidRequest(letter * 50_000, "hidden_states")]
    error = await refused(running, request())
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert str(error.details()).startswith(letter.encode("utf-8", "backslashreplace").decode())


async def test_bytes_that_are_no_message_are_an_invalid_request(running: Running) -> None:
    call = running.channel.unary_unary("/moeserve.v1.MoEService/Forward")
    for data in (b"\xff\xff\xff", b"\x2a\xff\xff\xff\xff\x0f" + bytes(70_000)):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(data)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_message_over_the_limit_is_refused_and_the_next_one_served(running: Running) -> None:
    message = request()
    message.used_token.CopyFrom(tensor_pb2.Tensor(dtype=6, data=bytes(2**20)))
    error = await refused(running, message)
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (await running.stub.Forward(request())).hidden_states.shape == [3, HIDDEN]


async def test_layers_and_counts_are_described(running: Running) -> None:
    listed = await running.stub.ListLayers(pb.ListLayersRequest())
    assert listed.model == "tiny"
    first, second = listed.layers
    assert (first.index, first.name, first.hidden_size, first.num_experts, first.top_k) == (0, "model.layers.3.mlp", HIDDEN, EXPERTS, 2)
    assert (first.activation, first.dtype, first.HasField("capacity_factor")) == ("swiglu", tensor_pb2.D_TYPE_BFLOAT16, False)
    assert (second.index, second.capacity_factor) == (1, 1.5)

    stats = await running.stub.GetStats(pb.GetStatsRequest())
    assert (stats.epoch, stats.queue_tokens) == (3, 11)
    assert [(layer.index, layer.tokens, list(layer.processed), list(layer.dropped)) for layer in stats.layers] == [
        (0, 7, [0, 1, 2, 3], [1, 2, 3, 4]),
        (1, 7, [0, 1, 2, 3], [1, 2, 3, 4]),
    ]
    (host,) = stats.hosts
    assert (host.name, host.up, host.restarts, host.node, host.device) == ("host-0", True, 2, "node-a", "cuda:0")
    assert (host.cuda_visible_devices, host.weights_bytes) == ("1", 4096)


async def test_an_unknown_method_is_unimplemented_and_unobserved(running: Running) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await running.channel.unary_unary("/moeserve.v1.MoEService/Nothing")(b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert running.observed == []
