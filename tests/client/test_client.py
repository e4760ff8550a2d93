"""Both clients against our server: the same answers, the same errors."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from moeserve import errors
from moeserve.api.output import ForwardOutput
from moeserve.client import AsyncClient, WireRequest, retries
from tests.client.calls import Calls
from tests.support.engine import EXPERTS, HIDDEN, FakeEngine, X, identity, spec
from tests.support.odd_tensors import Elsewhere, freed
from tests.support.servers import served
from tests.support.waiting import until_async


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("layer", "factor"), [(0, 1), (1, 2), ("model.layers.1.mlp", 2)])
async def test_forward(calls: Calls, dtype: torch.dtype, layer: int | str, factor: int) -> None:
    out = await calls.forward(X.to(dtype), layer=layer)
    assert isinstance(out, ForwardOutput)
    assert torch.equal(out.hidden_states, X.to(dtype) * factor)
    assert out.hidden_states.dtype == dtype
    assert out.requested.tolist() == out.processed.tolist() == [3, 3, 0, 0]
    assert (out.dropped.tolist(), out.dropped_tokens.tolist()) == ([0] * 4, [False] * 3)
    assert (out.aux_loss, out.z_loss, out.topk_ids, out.topk_weights) == (0.5, 0.25, None, None)


async def test_everything_said_arrives(calls: Calls, engine: FakeEngine) -> None:
    used_token, ids, weights = torch.tensor([True, False, True]), torch.tensor([[0, 1], [2, 3], [3, 0]]), torch.rand(3, 2)
    out = await calls.forward(X, used_token=used_token, topk_ids=ids, topk_weights=weights.bfloat16(), return_routing=True, model="tiny")
    assert out.topk_ids.tolist() == [[0, 1], [-1, -1], [3, 0]]
    assert torch.equal(out.topk_weights, weights.bfloat16().float() * used_token[:, None])
    ((_, request),) = engine.requests
    assert request.used_token is not None
    assert torch.equal(request.used_token, used_token)
    assert request.deadline is not None


async def test_what_is_changed_of_the_gate_arrives(calls: Calls, engine: FakeEngine) -> None:
    changes = {"token_ids": torch.tensor([7, 8, 9], dtype=torch.int32), "capacity_factor": 1.2, "noise": "rsample", "seed": 2**63 - 1}
    await calls.forward(X, **changes)
    await calls.forward_stream([WireRequest(X, **changes)])
    await calls.forward(X)
    for _, request in engine.requests[:2]:
        assert torch.equal(request.token_ids, changes["token_ids"])
        assert request.overrides == (1.2, "rsample", 2**63 - 1)
    assert (engine.requests[2][1].token_ids, engine.requests[2][1].overrides) == (None, (None, None, None))


async def test_large_and_empty_and_strided_batches(calls: Calls) -> None:
    large = torch.randn(HIDDEN, 20_000).T
    assert torch.equal((await calls.forward(large)).hidden_states, large)
    empty = await calls.forward(X[:0])
    assert (empty.hidden_states.shape, empty.processed.tolist()) == ((0, HIDDEN), [0] * EXPERTS)


@pytest.mark.parametrize(
    "raised",
    [
        errors.InvalidRequest("no", "hidden_states"),
        errors.UnknownLayer("no"),
        errors.Overloaded("no", retry_after_s=None),
        errors.ExpertUnavailable("no"),
        errors.DeadlineExceeded("no"),
        errors.Cancelled("no"),
        errors.PermissionDenied("no"),
        errors.NonFiniteOutput("no"),
        errors.MoEServeError("no"),
    ],
)
async def test_the_error_of_the_server_is_raised(calls: Calls, engine: FakeEngine, raised: errors.MoEServeError) -> None:
    engine.errors = [raised] * 4
    with pytest.raises(errors.MoEServeError, match=r"^no$") as caught:
        await calls.forward(X)
    assert type(caught.value) is type(raised)
    assert getattr(caught.value, "violations", None) == getattr(raised, "violations", None)


async def test_unknown_layers_and_invalid_requests(calls: Calls) -> None:
    with pytest.raises(errors.UnknownLayer, match=r"there is no layer 2; served: 0\.\.1 \(model\.layers\.0\.mlp, model\.layers\.1\.mlp\)"):
        await calls.forward(X, layer=2)
    with pytest.raises(errors.UnknownLayer, match="model 'huge' is not served"):
        await calls.forward(X, model="huge")
    with pytest.raises(errors.InvalidRequest, match=r"takes \[tokens, 16\]") as caught:
        await calls.forward(torch.zeros(3, 5))
    assert [violation.field for violation in caught.value.violations] == ["hidden_states"]
    with pytest.raises(errors.InvalidRequest, match="larger than max"):
        await calls.forward(torch.zeros(2**17, HIDDEN))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"hidden_states": [[1.0]]}, "hidden_states must be a torch.Tensor, got list"),
        ({"hidden_states": None}, "hidden_states must be a torch.Tensor, got NoneType"),
        ({"hidden_states": torch.zeros(1, 4, dtype=torch.float64)}, "hidden_states is float64; allowed: float32, float16, bfloat16"),
        ({"hidden_states": torch.zeros(1, 4, dtype=torch.int64)}, "hidden_states is int64"),
        (
            {"hidden_states": torch.zeros(1, 4, device="meta")},
            "hidden_states is a strided tensor on meta; allowed: dense tensors that have data",
        ),
        ({"hidden_states": torch.zeros(1, 4).to_sparse()}, "hidden_states is a sparse_coo tensor on cpu; allowed: dense"),
        ({"hidden_states": Elsewhere(1, 4)}, "hidden_states is a strided Elsewhere on cpu; allowed: dense tensors that have data"),
        ({"hidden_states": freed()}, "hidden_states is a strided tensor on cpu; allowed: dense tensors that have data"),
        ({"used_token": [True]}, "used_token must be a torch.Tensor, got list"),
        ({"topk_ids": torch.zeros(3, 2, dtype=torch.int16)}, "topk_ids is int16, which cannot be sent"),
        ({"token_ids": [1, 2, 3]}, "token_ids must be a torch.Tensor, got list"),
        ({"capacity_factor": "much"}, "capacity_factor is 'much', which cannot be sent"),
        ({"noise": 3}, "noise is 3, which cannot be sent"),
        ({"seed": -1}, "seed is -1, which cannot be sent"),
        ({"layer": -1}, "layer is -1; layers count from 0"),
        ({"layer": True}, "layer must be a position or a name, got bool"),
        ({"layer": 1.5}, "layer must be a position or a name, got float"),
    ],
)
async def test_what_no_service_takes_is_refused_without_one(
    connect: Callable[..., Calls], arguments: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(errors.InvalidRequest, match=sentence):
        await connect("127.0.0.1:1").forward(**{"hidden_states": X, **arguments})


async def test_a_service_that_is_not_there_is_named(connect: Callable[..., Calls], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "_AWAY_S", 1.0)
    calls = connect("127.0.0.1:1")
    for call in (calls.forward(X), calls.layers(), calls.stats(), calls.forward_stream([WireRequest(X)])):
        with pytest.raises(errors.ServiceUnreachable, match=r"127\.0\.0\.1:1 is unavailable: .*refused"):
            await call
    assert not await calls.ready()


@pytest.mark.parametrize("per_call", [True, False])
async def test_a_call_takes_no_longer_than_its_timeout(
    connect: Callable[..., Calls], target: str, engine: FakeEngine, per_call: bool
) -> None:
    engine.gate.clear()
    calls = connect(target, timeout=60 if per_call else 0.3)

    async def has_begun() -> bool:
        with pytest.raises(errors.DeadlineExceeded, match=rf"no answer from {target} within 0\.3 s"):
            await calls.forward(X, timeout=0.3 if per_call else None)
        return bool(engine.requests)

    await until_async(has_begun)
    await until_async(lambda: engine.cancelled == len(engine.requests))


async def test_unavailable_is_tried_again(calls: Calls, engine: FakeEngine) -> None:
    engine.errors = [errors.ExpertUnavailable("a host died")] * 3
    large = torch.randn(2**14, HIDDEN)
    assert torch.equal((await calls.forward(large)).hidden_states, large)
    assert len(engine.requests) == 4


async def test_requests_are_shared_out_among_the_frontends_behind_a_name(
    target: str, engine: FakeEngine, connect: Callable[..., Calls]
) -> None:
    """As a headless Service of Kubernetes has several addresses."""
    other = FakeEngine([(spec("model.layers.0.mlp"), identity)])
    with served(other) as (second, _, _):
        calls = connect(f"ipv4:{target},{second}")
        async with asyncio.timeout(30):
            while not (engine.requests and other.requests):  # the first ones go to whichever is connected to first
                await calls.forward(X, layer=0)
        before = len(engine.requests), len(other.requests)
        for _ in range(10):
            await calls.forward(X, layer=0)
        assert (len(engine.requests) - before[0], len(other.requests) - before[1]) == (5, 5)


async def test_nothing_else_is_tried_again(calls: Calls, engine: FakeEngine) -> None:
    engine.errors = [errors.Overloaded("full", retry_after_s=None)]
    with pytest.raises(errors.Overloaded):
        await calls.forward(X)
    assert len(engine.requests) == 1


async def test_layers_stats_ready(engine: FakeEngine, connect: Callable[..., Calls]) -> None:
    with served(engine) as (target, server, loop):
        calls = connect(target)
        first, second = await calls.layers()
        assert (first.index, first.name, first.hidden_size, first.intermediate_size) == (0, "model.layers.0.mlp", HIDDEN, 32)
        assert (first.num_experts, first.top_k, first.activation, first.dtype) == (EXPERTS, 2, "swiglu", "bfloat16")
        assert (second.index, second.capacity_factor) == (1, 1.25)

        stats, truth = await calls.stats(), engine.stats()
        assert (stats.epoch, stats.queue_tokens, stats.hosts) == (truth.epoch, truth.queue_tokens, truth.hosts)
        for got, expected in zip(stats.layers, truth.layers, strict=True):
            assert (got.name, got.tokens) == (expected.name, expected.tokens)
            assert torch.equal(got.processed, expected.processed)
            assert torch.equal(got.dropped, expected.dropped)

        assert not await calls.ready()
        for layer in range(2):
            loop.soon(server.set_serving, layer, True)
        async with asyncio.timeout(10):
            while not await calls.ready():
                pass


async def test_cancelling_a_call_cancels_the_work(target: str, engine: FakeEngine) -> None:
    engine.gate.clear()
    async with AsyncClient(target) as client:
        task = asyncio.create_task(client.forward(X))
        await until_async(lambda: engine.requests)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until_async(lambda: engine.cancelled)


def test_a_client_never_loads_the_engine() -> None:
    script = "import sys, moeserve; moeserve.Client, moeserve.AsyncClient; print(*sys.modules)"
    loaded = set(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=60).stdout.split())
    engine = {
        "ray",
        "transformers",
        "pydantic",
        "zmq",
        *(f"moeserve.{room}" for room in ("config", "server", "gating", "frontend", "request")),
    }
    assert not loaded & engine


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
async def test_the_answer_is_where_the_question_was(calls: Calls) -> None:
    out = await calls.forward(X.cuda(), return_routing=True)
    assert {value.device.type for value in vars(out).values() if isinstance(value, torch.Tensor)} == {"cuda"}
    (answer,) = await calls.forward_stream([WireRequest(X.cuda())])
    assert answer.result.hidden_states.is_cuda
