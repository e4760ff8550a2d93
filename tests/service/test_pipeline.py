"""Layers on disjoint groups of hosts, and a client that keeps all of them busy."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest
import torch

from moeserve import AsyncClient, InvalidRequest, MoELayer
from moeserve.client import through_layers
from tests.support.closeness import assert_close
from tests.support.harness import CHANNELS, Kind, ServiceHarness
from tests.support.held import Held

LAYERS = [{"hidden_size": 16, "intermediate_size": 24, "num_experts": 4, "seed": seed} for seed in range(4)]
STAGES = {"layers": LAYERS, "placement": {"num_hosts": 4, "pipeline_stages": 2}}


def batches(number: int) -> list[torch.Tensor]:
    return [torch.randn(5 + index, 16, generator=torch.Generator().manual_seed(index)) for index in range(number)]


async def run(target: str, given: list[torch.Tensor], **options: object) -> list[torch.Tensor]:
    async with AsyncClient(target) as client:
        return [answer async for answer in through_layers(client, given, range(4), **options)]  # type: ignore[arg-type]


@pytest.mark.parametrize("in_flight", [1, 3, 20])
@pytest.mark.parametrize("kind", CHANNELS)
def test_answers_are_those_of_layer_after_layer_in_the_order_of_the_batches(kind: Kind, in_flight: int, tmp_path: Path) -> None:
    layers, given = [MoELayer(**layer) for layer in LAYERS], batches(9)
    with ServiceHarness(STAGES, kind, tmp_path) as service:
        held = [{layer for layer, place in enumerate(service.placement.layers) if place.shards_on(host)} for host in range(4)]
        assert held == [{0, 1}, {0, 1}, {2, 3}, {2, 3}]
        answers = asyncio.run(run(service.target, given, in_flight=in_flight, between=lambda position, rows: rows + position))
        assert asyncio.run(run(service.target, [])) == []
    assert len(answers) == len(given)
    for rows, answer in zip(given, answers, strict=True):
        expected = rows
        for position, layer in enumerate(layers):
            expected = layer(expected) + position
        assert_close(answer, expected)


def test_all_stages_work_at_the_same_time(tmp_path: Path) -> None:
    answers: list[torch.Tensor] = []
    with ServiceHarness(STAGES, "local", tmp_path) as service:
        first, second = Held(service.hosts[0], 1), Held(service.hosts[2], 2)
        caller = threading.Thread(target=lambda: answers.extend(asyncio.run(run(service.target, batches(4)))))
        caller.start()
        assert first.begun.acquire(timeout=30)
        first.leave.release()
        assert second.begun.acquire(timeout=30), "the first pass has come to the second stage, and stays there"
        assert first.begun.acquire(timeout=30), "meanwhile the first stage has the next one"
        for held in (first, second):
            held.leave.release(20)
        caller.join(30)
    assert len(answers) == 4


def test_a_batch_that_fails_ends_the_whole(tmp_path: Path) -> None:
    given = batches(3)
    given[1][2, 3] = torch.nan
    with (
        ServiceHarness(STAGES, "local", tmp_path) as service,
        pytest.raises(InvalidRequest, match="hidden_states of token 2 is not finite"),
    ):
        asyncio.run(run(service.target, given))


def test_batches_go_through_at_least_one_layer() -> None:
    async def through_none() -> None:
        async with AsyncClient("127.0.0.1:1") as client:
            async for _ in through_layers(client, batches(1), []):
                pass

    with pytest.raises(InvalidRequest, match="layers is empty"):
        asyncio.run(through_none())
