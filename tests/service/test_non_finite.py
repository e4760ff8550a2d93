"""What experts could not compute never leaves the service: its request fails, those that were run with it do not.

T tokens, H hidden size, K choices per token.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from moeserve import AsyncClient, Client, ForwardOutput, MoELayer, NonFiniteOutput
from moeserve.api.request import LayerRequest
from moeserve.api.wire import WireRequest
from tests.support.closeness import assert_close
from tests.support.harness import CHANNELS, ServiceHarness

HIDDEN, EXPERTS = 16, 6
SIZES: dict[str, Any] = {"hidden_size": HIDDEN, "intermediate_size": 8, "num_experts": EXPERTS}
#: finite, but its square is not
HUGE = 1e30
COUNTER = "moeserve_non_finite_outputs_total"


@pytest.fixture(scope="module", params=[*((kind, "all_to_all") for kind in CHANNELS), ("shm", "ring")], ids="-".join)
def service(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceHarness]:
    kind, pattern = request.param
    layers = [SIZES, {**SIZES, "seed": 1, "shared_expert": {"intermediate_size": 4, "mixing": "residual"}}]
    config = {"layers": layers, "placement": {"num_hosts": 3}, "communication": {"pattern": pattern}}
    with ServiceHarness(config, kind, tmp_path_factory.mktemp("s")) as harness:
        yield harness


def rows(value: float = 1.0, num_tokens: int = 3) -> torch.Tensor:
    """The last one is of `value`."""
    hidden_states = torch.randn(num_tokens, HIDDEN, generator=torch.Generator().manual_seed(num_tokens))
    hidden_states[-1] = value
    return hidden_states


def failed(service: ServiceHarness, layer: int) -> float:
    return service.metrics.registry.get_sample_value(COUNTER, {"layer": f"layers.{layer}"}) or 0.0


@pytest.mark.parametrize("layer", [0, 1])
def test_the_caller_gets_the_error_of_the_layer_in_one_process(
    service: ServiceHarness, layer: int, caplog: pytest.LogCaptureFixture
) -> None:
    reference = MoELayer(**SIZES, seed=layer, **({} if layer == 0 else {"shared_expert": {"intermediate_size": 4, "mixing": "residual"}}))
    with pytest.raises(NonFiniteOutput) as of_layer:
        reference.run(rows(HUGE))
    before, tokens = failed(service, layer), service.frontend.stats().layers[layer].tokens
    with Client(service.target) as client, caplog.at_level(logging.WARNING, "moeserve"), pytest.raises(NonFiniteOutput) as of_service:
        client.forward(rows(HUGE), layer=layer)
    told, expected = (str(error.value).replace(f"layers.{layer}", "layers.0") for error in (of_service, of_layer))
    assert told == expected
    assert "output of token 2 is not finite" in told
    assert failed(service, layer) == before + 1
    assert service.frontend.stats().layers[layer].tokens == tokens
    assert str(of_service.value) in caplog.messages
    assert service.metrics.registry.get_sample_value("moeserve_requests_total", {"method": "Forward", "code": "DATA_LOSS"}) >= 1


def test_those_in_the_same_batch_are_answered(service: ServiceHarness) -> None:
    """The first two run alone; the others are joined while those are under way."""
    good, bad = LayerRequest(rows(), return_routing=True), LayerRequest(rows(HUGE))
    too_large = LayerRequest(rows().half(), topk_ids=torch.tensor([[1]] * 3), topk_weights=torch.full((3, 1), 1e9))

    async def together() -> list[ForwardOutput | BaseException]:
        crowd = [good, good, bad, good, bad, good, too_large, too_large]
        return await asyncio.gather(*(service.frontend.forward(0, request) for request in crowd), return_exceptions=True)

    before, batches = failed(service, 0), service.metrics.registry.get_sample_value("moeserve_batch_tokens_count")
    answers = service.call(together())
    assert service.metrics.registry.get_sample_value("moeserve_batch_tokens_count") < batches + len(answers)
    expected = MoELayer(**SIZES).run(rows()).hidden_states
    for index, answer in enumerate(answers):
        if index in (2, 4):
            assert isinstance(answer, NonFiniteOutput) and "token 2 is not finite" in str(answer)
        elif index > 5:
            assert isinstance(answer, NonFiniteOutput) and "token 0 does not fit float16" in str(answer)
            assert str(answer).endswith("computed by expert 1")
        else:
            assert isinstance(answer, ForwardOutput)
            assert_close(answer.hidden_states, expected)
    assert failed(service, 0) == before + 4


async def test_a_stream_goes_on(service: ServiceHarness) -> None:
    async def requests():
        for number in range(6):
            yield WireRequest(rows(HUGE if number % 2 else 1.0), layer=0, request_id=str(number))

    async with AsyncClient(service.target) as client:
        answers = {answer.request_id: answer.result async for answer in client.forward_stream(requests())}
    assert all(type(answers[str(number)]) is (NonFiniteOutput if number % 2 else ForwardOutput) for number in range(6))
