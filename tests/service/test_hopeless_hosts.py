"""Hosts that do not come back: whoever needs one is told why and at once, everybody else is answered, and it may heal."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from moeserve import Client, ExpertUnavailable
from tests.support.followers import ThreadedFrontend
from tests.support.harness import ServiceHarness
from tests.support.waiting import until

LAYER = {"hidden_size": 16, "intermediate_size": 8, "num_experts": 4, "gating": {"top_k": 1}}
WHY = "host-1 died 3 times while it loaded its experts."


@contextmanager
def kept(folder: Path, **placement: object) -> Iterator[ServiceHarness]:
    """A service whose controller keeps it, and lets frontends follow."""
    config = {"layers": [LAYER], "placement": {"num_hosts": 2, **placement}}
    with ServiceHarness(config, "shm", folder) as service:
        service.call(service.open_control())
        keeper = service.call(_keeper(service))
        try:
            yield service
        finally:
            service.call(_end(keeper))


async def _keeper(service: ServiceHarness) -> asyncio.Task[None]:
    return asyncio.create_task(service.controller.keep())


async def _end(keeper: asyncio.Task[None]) -> None:
    keeper.cancel()
    await asyncio.gather(keeper, return_exceptions=True)


def ask(client: Client, expert: int) -> list[int]:
    """Rows for one expert: 0 and 1 are on host-0, 2 and 3 on host-1."""
    ids, weights = torch.full((2, 1), expert), torch.ones(2, 1)
    return client.forward(torch.randn(2, 16), topk_ids=ids, topk_weights=weights, timeout=60).processed.tolist()


def refused(client: Client, expert: int) -> str:
    """What is said of an expert on a host that is down, as soon as it is known that waiting is no use."""
    with pytest.raises(ExpertUnavailable) as told:
        ask(client, expert)
    return str(told.value)


def test_whoever_needs_it_is_told_why_at_once_and_everybody_else_is_answered(tmp_path: Path) -> None:
    with kept(tmp_path) as service, ThreadedFrontend(service.control_target) as frontend:
        for target in (service.target, frontend.target):
            with Client(target) as client:
                assert ask(client, 3) == [0, 0, 0, 2]
        service.failing[1] = WHY
        service.hosts[1].stop()
        for target in (service.target, frontend.target):
            with Client(target) as client:
                assert "experts 3 of layer layers.0 on host-1 are not available: " + WHY in refused(client, 3)
                assert ask(client, 0) == [2, 0, 0, 0]
                assert not client.ready()
        assert WHY in service.controller.status().shortage
        service.failing.clear()
        service.hosts[1].start()
        for target in (service.target, frontend.target):
            with Client(target) as client:
                until(client.ready)
                assert ask(client, 3) == [0, 0, 0, 2]
        assert service.controller.status().shortage == ""


def test_who_waits_already_is_told_too(tmp_path: Path) -> None:
    with kept(tmp_path) as service, Client(service.target) as client, ThreadPoolExecutor(1) as pool:
        service.hosts[1].stop()
        waiting = pool.submit(refused, client, 2)
        until(lambda: client.stats().queue_tokens == 2)  # it may be on its way
        service.failing[1] = WHY
        assert WHY in waiting.result(60)


def test_other_copies_of_its_experts_answer(tmp_path: Path) -> None:
    with kept(tmp_path, copies=2) as service, Client(service.target) as client:
        service.failing[1] = WHY
        service.hosts[1].stop()
        for expert in (*range(4), *range(4)):
            assert ask(client, expert)[expert] == 2
        assert client.ready()


def test_a_host_whose_node_is_gone_is_not_waited_for_when_nothing_can_replace_it(tmp_path: Path) -> None:
    """One host alone has no room for all the weights, which are 6144 bytes."""
    with kept(tmp_path, memory_per_host_bytes=4000) as service, Client(service.target) as client:
        service.cluster.nodes.cpus = 1.0
        service.given_up.add(1)
        service.hosts[1].stop()
        assert "host-1 are not available: its node is gone, and placement.num_hosts is 2" in refused(client, 3)
        assert ask(client, 1) == [0, 2, 0, 0]
