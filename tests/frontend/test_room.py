"""A host has no room for more rows: other copies compute them, and nobody who does not need it hears of that."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from moeserve import Client, MoELayer
from moeserve.api.request import LayerRequest
from moeserve.errors import Overloaded
from moeserve.memory import Block
from tests.support.closeness import assert_close
from tests.support.harness import CHANNELS, Kind, ServiceHarness
from tests.support.held import Held

LAYER: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 8, "num_experts": 4, "gating": {"top_k": 2}}
ROWS = torch.randn(40, 16, generator=torch.Generator().manual_seed(5))


def config(copies: int, pattern: str = "all_to_all", **resilience: Any) -> dict[str, Any]:
    placement = {"num_hosts": 4 if copies > 1 else 2, "copies": copies}
    return {"layers": [LAYER], "placement": placement, "communication": {"pattern": pattern}, "resilience": resilience}


@contextmanager
def full(service: ServiceHarness, number: int) -> Iterator[None]:
    """Messages in flight fill the memory of the channel to a host."""
    channel = service.frontend._links[number].channel
    assert channel is not None
    blocks: list[Block] = []
    nbytes = 2**30
    while nbytes >= 2**6:
        try:
            blocks.append(channel._arena.lend(nbytes))
        except Overloaded:
            nbytes //= 2
    yield
    blocks.clear()


@pytest.mark.parametrize("pattern", ["all_to_all", "ring"])
@pytest.mark.parametrize("kind", CHANNELS)
def test_other_copies_compute_what_a_host_has_no_room_for(kind: Kind, pattern: str, tmp_path: Path) -> None:
    with ServiceHarness(config(2, pattern), kind, tmp_path) as service, Client(service.target, retry=False) as client:
        for number in range(4):
            with full(service, number):
                assert_close(client.forward(ROWS).hidden_states, MoELayer(**LAYER)(ROWS))


def test_other_copies_compute_what_a_host_has_no_room_to_answer(tmp_path: Path) -> None:
    """It does not err: it gets rows again at once."""
    with ServiceHarness(config(2), "local", tmp_path) as service, Client(service.target, retry=False) as client:
        held = Held(service.hosts[1])
        held.error = Overloaded("replies under way fill the pool")
        held.let_go()
        for _ in range(12):
            assert_close(client.forward(ROWS).hidden_states, MoELayer(**LAYER)(ROWS))
        assert len(held.rows) > 3
        assert service.frontend.stats().hosts[1].state == "up"


@pytest.mark.parametrize("policy", ["retry", "renormalize"])
def test_without_a_copy_those_are_refused_who_need_the_host(policy: str, tmp_path: Path) -> None:
    """Of one batch."""
    with ServiceHarness(config(1, on_expert_failure=policy, k_min=0, partial_after_ms=30_000), "local", tmp_path) as service:

        async def both() -> list[Any]:
            ids = [torch.full((2, 1), expert) for expert in (0, 3)]  # the first is on host-0, the other one on host-1
            with service.frontend.together():
                requests = [LayerRequest(ROWS[:2], topk_ids=each, topk_weights=torch.ones(2, 1)) for each in ids]
                answers = [service.frontend.submit(0, request) for request in requests]
            return await asyncio.gather(*answers, return_exceptions=True)

        with full(service, 1):
            well, refused = service.call(both())
        assert well.processed.tolist() == [2, 0, 0, 0]
        assert isinstance(refused, Overloaded) and refused.retry_after_s is not None
        assert [output.processed.sum() for output in service.call(both())] == [2, 2], "as soon as there is room"
