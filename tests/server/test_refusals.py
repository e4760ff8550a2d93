"""Requests that are wrong are refused with the field's name and one sentence, before the engine sees them."""

from __future__ import annotations

import re
from collections.abc import Callable

import grpc
import pytest
import torch
from google.rpc import error_details_pb2 as details

from moeserve.errors import Overloaded
from moeserve.v1 import moe_service_pb2 as pb
from moeserve.v1 import moe_service_pb2_grpc as pb_grpc
from moeserve.v1 import tensor_pb2
from tests.support.engine import HIDDEN
from tests.support.messages import detail, refused, request, tensor, tokens
from tests.support.servers import Running


def nan_at(token: int) -> torch.Tensor:
    hidden_states = tokens()
    hidden_states[token, 3] = float("nan")
    return hidden_states


IDS, WEIGHTS = torch.tensor([[0, 1], [2, 3], [3, 0]]), torch.ones(3, 2)


def routed(ids: torch.Tensor = IDS, weights: torch.Tensor = WEIGHTS) -> pb.ForwardRequest:
    return request(topk_ids=tensor(ids), topk_weights=tensor(weights))


INVALID: dict[str, tuple[Callable[[], pb.ForwardRequest], str, str]] = {
    "no tensor": (lambda: pb.ForwardRequest(layer_index=0), "hidden_states", "missing"),
    "no dtype": (lambda: pb.ForwardRequest(layer_index=0, hidden_states=tensor_pb2.Tensor(shape=[0, 16])), "hidden_states", "dtype"),
    "integers": (lambda: request(torch.zeros(3, HIDDEN, dtype=torch.int64)), "hidden_states", "int64"),
    "bytes missing": (
        lambda: pb.ForwardRequest(layer_index=0, hidden_states=tensor_pb2.Tensor(dtype=1, shape=[3, HIDDEN], data=b"123")),
        "hidden_states",
        "3 bytes",
    ),
    "one dimension": (lambda: request(torch.zeros(HIDDEN)), "hidden_states", r"\[16\]"),
    "three dimensions": (lambda: request(torch.zeros(1, 3, HIDDEN)), "hidden_states", r"\[1, 3, 16\]"),
    "wrong hidden size": (lambda: request(torch.zeros(3, HIDDEN + 1)), "hidden_states", r"\[tokens, 16\]"),
    "too many tokens": (lambda: request(torch.zeros(65, HIDDEN)), "hidden_states", "at most 64"),
    "NaN": (lambda: request(nan_at(2)), "hidden_states", "token 2"),
    "Inf": (lambda: request(nan_at(1).nan_to_num(float("inf"))), "hidden_states", "token 1"),
    "no layer": (lambda: request(layer=None), "layer", "no layer"),
    "used_token of floats": (lambda: request(used_token=tensor(torch.ones(3))), "used_token", "bool"),
    "used_token too long": (lambda: request(used_token=tensor(torch.ones(4, dtype=torch.bool))), "used_token", r"\[3\]"),
    "ids alone": (lambda: request(topk_ids=tensor(IDS)), "topk_weights", "together"),
    "weights alone": (lambda: request(topk_weights=tensor(WEIGHTS)), "topk_ids", "together"),
    "float ids": (lambda: routed(ids=IDS.float()), "topk_ids", "float32"),
    "ids too few": (lambda: routed(IDS[:2], WEIGHTS[:2]), "topk_ids", r"\[2, 2\]"),
    "no choice": (lambda: routed(IDS[:, :0], WEIGHTS[:, :0]), "topk_ids", r"\[3, 0\]"),
    "more choices than experts": (lambda: routed(torch.zeros(3, 5, dtype=torch.int64), torch.ones(3, 5)), "topk_ids", r"\[3, 5\]"),
    "weights of another shape": (lambda: routed(weights=torch.ones(3, 1)), "topk_ids", r"\[3, 1\]"),
    "no such expert": (lambda: routed(ids=IDS + 1), "topk_ids", "is 4"),
    "negative expert": (lambda: routed(ids=IDS - 2), "topk_ids", "is -2"),
    "an expert twice": (lambda: routed(ids=torch.tensor([[0, 1], [2, 2], [3, 0]])), "topk_ids", r"topk_ids\[1\]"),
    "token_ids of floats": (lambda: request(token_ids=tensor(torch.ones(3))), "token_ids", "float32"),
    "too few token_ids": (lambda: request(token_ids=tensor(IDS[:2, 0].contiguous())), "token_ids", r"\[2\]"),
    "a token id too large": (lambda: request(token_ids=tensor(torch.tensor([0, 2**32, 1]))), "token_ids", r"token_ids\[1\]"),
    "capacity_factor not allowed": (lambda: request(capacity_factor=2.0), "capacity_factor", "request_overrides .* 'capacity_factor'"),
    "noise not allowed": (lambda: request(noise="none"), "noise", "request_overrides .* 'noise'"),
    "seed not allowed": (lambda: request(seed=1), "seed", "request_overrides .* 'noise'"),
    "no capacity": (lambda: request(layer=1, capacity_factor=0.0), "capacity_factor", "greater than 0"),
    "capacity of NaN": (lambda: request(layer=1, capacity_factor=float("nan")), "capacity_factor", "(?i)nan"),
    "no such noise": (lambda: request(layer=1, noise="x" * 9000), "noise", "'none', 'jitter', 'rsample'"),
    "noise without a seed": (lambda: request(layer=1, noise="jitter"), "seed", "seed is required"),
    "a seed too large": (lambda: request(layer=1, noise="jitter", seed=2**64 - 1), "seed", "less than 9223372036854775808"),
    "noise of a routed request": (
        lambda: request(layer=1, noise="jitter", seed=1, topk_ids=tensor(IDS), topk_weights=tensor(WEIGHTS)),
        "noise",
        "no meaning",
    ),
    "a weight of NaN": (lambda: routed(weights=torch.full((3, 2), float("nan"))), "topk_weights", "token 0"),
}


@pytest.mark.parametrize("case", INVALID)
async def test_an_invalid_request_is_refused_naming_the_field(running: Running, case: str) -> None:
    make, field, sentence = INVALID[case]
    error = await refused(running, make())
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    bad_request = detail(error, details.BadRequest)
    assert isinstance(bad_request, details.BadRequest)
    (violation,) = bad_request.field_violations
    assert violation.field == field
    assert re.search(sentence, violation.description)
    assert violation.description == error.details()
    assert running.engine.requests == []


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        (request(layer=2), "there is no layer 2; served: 0..1 (model.layers.3.mlp, model.layers.5.mlp)"),
        (request(layer=2**32 - 1), "there is no layer 4294967295; served: 0..1 (model.layers.3.mlp, model.layers.5.mlp)"),
        (request(layer="lm_head"), "there is no layer 'lm_head'; served: model.layers.3.mlp, model.layers.5.mlp"),
        (request(layer=""), "there is no layer ''; served: model.layers.3.mlp, model.layers.5.mlp"),
        (request(model="huge"), "model 'huge' is not served; this service serves 'tiny'"),
    ],
)
async def test_an_unknown_layer_says_what_there_is(running: Running, message: pb.ForwardRequest, sentence: str) -> None:
    error = await refused(running, message)
    assert (error.code(), error.details()) == (grpc.StatusCode.NOT_FOUND, sentence)


async def test_what_would_be_refused_is_not_read(running: Running) -> None:
    """Whose call it is, is known before."""
    running.engine.refusing = Overloaded("too much to do", 0.25)
    error = await refused(running, request())
    assert (error.code(), error.details()) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "too much to do")
    retry = detail(error, details.RetryInfo)
    assert isinstance(retry, details.RetryInfo) and retry.retry_delay.ToMilliseconds() == 250
    running.engine.refusing = None
    await running.stub.Forward(request())
    async with grpc.aio.insecure_channel(running.target, options=[("grpc.use_local_subchannel_pool", 1)]) as other:
        await pb_grpc.MoEServiceStub(other).Forward(request())  # type: ignore[no-untyped-call]
    first, second = (asked.caller for _, asked in running.engine.requests)
    assert running.engine.callers == [first, first, second] and first != second


async def test_a_size_that_never_fits_has_no_time_to_try_again(running: Running) -> None:
    running.engine.errors = [Overloaded("never", retry_after_s=None)]
    error = await refused(running, request())
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    with pytest.raises(AssertionError, match="never"):
        detail(error, details.RetryInfo)
