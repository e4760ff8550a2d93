"""A host goes away under way: who is answered, who waits, who is told."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moeserve.api.output import ForwardOutput
from moeserve.api.request import LayerRequest
from moeserve.errors import ExpertUnavailable
from tests.support.harness import CHANNELS, Kind, ServiceHarness
from tests.support.seen import gone
from tests.support.waiting import until_async

LAYER = {"hidden_size": 16, "intermediate_size": 8, "num_experts": 4, "gating": {"top_k": 1}}


def config(**resilience: object) -> dict[str, object]:
    return {"layers": [LAYER], "placement": {"num_hosts": 2}, "resilience": resilience}


def routed_to(expert: int, tokens: int = 2) -> LayerRequest:
    """Rows for one expert only: 0 and 1 live on host-0, 2 and 3 on host-1."""
    ids = torch.full((tokens, 1), expert)
    return LayerRequest(torch.randn(tokens, 16), topk_ids=ids, topk_weights=torch.ones(tokens, 1))


@pytest.mark.parametrize("kind", CHANNELS)
def test_rows_of_a_lost_host_wait_for_it_and_the_rest_is_answered_at_once(kind: Kind, tmp_path: Path) -> None:
    with ServiceHarness(config(), kind, tmp_path) as service, ThreadPoolExecutor() as pool:
        service.hosts[1].stop()
        service.call(gone(service, 1))
        assert service.metrics.registry.get_sample_value("moeserve_host_up", {"host": "host-1"}) == 0

        def send(request: LayerRequest) -> ForwardOutput:
            return service.call(service.frontend.forward(0, request))

        waiting = pool.submit(send, routed_to(3))
        service.call(until_async(lambda: service.frontend.stats().queue_tokens == 2))
        for _ in range(5):
            assert send(routed_to(0)).processed.tolist() == [2, 0, 0, 0]
        assert not waiting.done()
        service.hosts[1].start()
        assert waiting.result(timeout=20).processed.tolist() == [0, 0, 0, 2]
        sample = service.metrics.registry.get_sample_value
        assert sample("moeserve_host_restarts_total") == 1
        assert sample("moeserve_host_up", {"host": "host-1"}) == 1
        assert sample("moeserve_expert_retries_total", {"reason": "host_lost"}) >= 1


def test_many_who_wait_for_a_lost_host_hold_up_nobody(tmp_path: Path) -> None:
    """However many wait, and one of them in turns: who needs no lost host is answered, and they are when it is back."""
    with ServiceHarness(config() | {"batching": {"max_batch_tokens": 512}}, "local", tmp_path) as service:
        service.hosts[1].stop()
        service.call(gone(service, 1))

        async def submit(request: LayerRequest) -> asyncio.Future[ForwardOutput]:
            return service.frontend.submit(0, request)

        async def answered(future: asyncio.Future[ForwardOutput]) -> ForwardOutput:
            return await asyncio.wait_for(asyncio.shield(future), 20)

        waiting = [service.call(submit(routed_to(3, tokens))) for tokens in (2, 1400, 500, 2, 2, 300)]
        for _ in range(3):
            assert service.call(answered(service.call(submit(routed_to(0))))).processed.tolist() == [2, 0, 0, 0]
        assert not any(future.done() for future in waiting)
        given_up = waiting.pop()
        service._thread.soon(given_up.cancel)
        service.hosts[1].start()
        assert [int(service.call(answered(future)).processed[3]) for future in waiting] == [2, 1400, 500, 2, 2]
        assert service.call(answered(service.call(submit(routed_to(3))))).processed.tolist() == [0, 0, 0, 2]
        service.call(until_async(lambda: service.frontend.stats().queue_tokens == 0))


def test_who_waits_for_a_host_that_is_back_goes_on_before_those_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More wait for a lost host than may rest; those of the other one still have their turn when it is back."""
    settings = config() | {"placement": {"num_hosts": 4}, "batching": {"max_batch_tokens": 512}}
    with ServiceHarness(settings, "local", tmp_path) as service:
        for number in (1, 2):
            monkeypatch.setattr(service.hosts[number], "start", lambda: None)
            service.hosts[number].stop()
            service.call(gone(service, number))

        async def submit(request: LayerRequest) -> asyncio.Future[ForwardOutput]:
            return service.frontend.submit(0, request)

        async def answered(future: asyncio.Future[ForwardOutput]) -> int:
            return int((await asyncio.wait_for(asyncio.shield(future), 20)).processed.sum())

        first = service.call(submit(routed_to(1)))
        others = [service.call(submit(routed_to(2, 500))) for _ in range(6)]
        resting = service.frontend._batchers[0]._resting
        service.call(until_async(lambda: len(service.frontend._forwards[0]._deliveries) == 5))  # two of them in places of their own
        assert not resting.places
        monkeypatch.undo()
        service.hosts[1].start()
        assert service.call(answered(first)) == 2
        assert not any(future.done() for future in others)
        service.hosts[2].start()
        assert [service.call(answered(future)) for future in others] == [500] * 6
        service.call(until_async(lambda: service.frontend.stats().queue_tokens == 0))


def test_requests_of_one_batch_are_told_apart(tmp_path: Path) -> None:
    """Two requests are joined; one of them needs the lost host, the other does not and must not wait for it."""
    with ServiceHarness(config(), "local", tmp_path) as service:

        async def both() -> tuple[asyncio.Task[ForwardOutput], asyncio.Task[ForwardOutput]]:
            # The first two keep the pipeline busy, so that the last two are joined.
            fillers = [asyncio.ensure_future(service.frontend.forward(0, routed_to(0))) for _ in range(2)]
            lost = asyncio.ensure_future(service.frontend.forward(0, routed_to(2)))
            well = asyncio.ensure_future(service.frontend.forward(0, routed_to(1)))
            await asyncio.gather(*fillers, well)
            return lost, well

        service.hosts[1].stop()
        service.call(gone(service, 1))
        lost, well = service.call(both())
        assert well.result().processed.tolist() == [0, 2, 0, 0]
        assert not lost.done()
        service.hosts[1].start()

        async def finish() -> ForwardOutput:
            return await lost

        assert service.call(finish()).processed.tolist() == [0, 0, 2, 0]


def test_policy_fail_answers_at_once(tmp_path: Path) -> None:
    with ServiceHarness(config(on_expert_failure="fail"), "shm", tmp_path) as service:
        service.hosts[1].stop()
        service.call(gone(service, 1))
        with pytest.raises(ExpertUnavailable, match="lost with host-1"):
            service.call(service.frontend.forward(0, routed_to(3)))
        assert service.call(service.frontend.forward(0, routed_to(0))).processed.sum() == 2


def test_a_host_that_stays_away_ends_in_an_error_at_the_deadline(tmp_path: Path) -> None:
    with ServiceHarness(config(request_timeout_s=2.0), "shm", tmp_path) as service:
        service.hosts[1].stop()
        service.call(gone(service, 1))
        with pytest.raises(ExpertUnavailable, match=r"^experts 3 of layer layers.0 on host-1 did not come back before the deadline$"):
            service.call(service.frontend.forward(0, routed_to(3)))
        patient = replace(routed_to(1), deadline=time.monotonic() + 30)
        assert service.call(service.frontend.forward(0, patient)).processed.sum() == 2


def test_a_layer_without_all_its_experts_is_not_serving(tmp_path: Path) -> None:
    with ServiceHarness(config(), "local", tmp_path) as service:
        reported: list[bool] = []
        service.frontend._on_health = lambda layer, healthy: reported.append(healthy)
        service.hosts[0].stop()
        service.call(gone(service, 0))
        assert reported == [False]
        live = {"layer": "layers.0", "expert": "0", "state": "live"}
        assert service.metrics.registry.get_sample_value("moeserve_expert_copies", live) == 0
        service.hosts[0].start()
        service.call(until_async(lambda: reported == [False, True]))
        assert service.metrics.registry.get_sample_value("moeserve_expert_copies", live) == 1
