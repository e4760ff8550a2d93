"""What vLLM's process does when the service refuses a call: needs no vLLM."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from moeserve.engines.vllm.calls import ServiceCalls
from moeserve.engines.vllm.settings import Settings
from moeserve.errors import Overloaded
from tests.support.engine import FakeEngine, identity, spec
from tests.support.servers import served


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine([(spec("model.layers.0.mlp", 8, 4), identity)])


@pytest.fixture
def calls(engine: FakeEngine) -> Iterator[ServiceCalls]:
    with served(engine) as (target, _, _):
        calls = ServiceCalls(Settings(target=target, embedded=False), fails_requests=False)
        with calls._client:
            yield calls


def asked(calls: ServiceCalls) -> torch.Tensor:
    layer = calls.place("model.layers.0.mlp.experts", 4, 8)
    return calls.forward(layer, torch.ones(3, 8), None, torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1))


def test_what_may_pass_is_waited_for(calls: ServiceCalls, engine: FakeEngine) -> None:
    engine.errors = [Overloaded("a queue is full", 0.01)]
    assert asked(calls).eq(1).all()


def test_a_batch_that_will_never_fit_is_not_sent_again(calls: ServiceCalls, engine: FakeEngine) -> None:
    engine.errors = [Overloaded("3 tokens are more than server.max_queued_tokens = 2", None)]
    with pytest.raises(Overloaded, match="3 tokens are more than"):
        asked(calls)
    assert len(engine.requests) == 1
