"""A host dies in the middle of a message that several share: no request is lost, none is answered wrong."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from moeserve import MoELayer
from moeserve.api.output import ForwardOutput
from moeserve.api.request import LayerRequest
from moeserve.errors import DeadlineExceeded, ExpertUnavailable
from tests.support.closeness import assert_close
from tests.support.harness import CHANNELS, Killed, Kind, ServiceHarness
from tests.support.held import Held
from tests.support.seen import gone
from tests.support.waiting import until_async

LAYER = {"hidden_size": 16, "intermediate_size": 8, "num_experts": 8}
#: some of it is added by the frontend itself: once, however often a batch is sent again
WITH_IDENTITY = LAYER | {"identity_experts": 2}
HOSTS = 4


def config(pattern: str, **resilience: object) -> dict[str, object]:
    return {
        "layers": [LAYER],
        "placement": {"num_hosts": HOSTS},
        "communication": {"pattern": pattern},
        "resilience": resilience,
    }


def ask(service: ServiceHarness, hidden_states: torch.Tensor, within_s: float = 50.0) -> ForwardOutput:
    return service.call(service.frontend.forward(0, LayerRequest(hidden_states, deadline=time.monotonic() + within_s)))


def is_introduced(service: ServiceHarness, number: int) -> bool:
    """All hosts have heard of the incarnation that lives."""
    lives = service.hosts[number].host.info.incarnation
    return all(host.host.relay._directory[number].incarnation == lives for host in service.hosts)


@pytest.mark.parametrize("victim", range(HOSTS))
@pytest.mark.parametrize("pattern", ["hierarchical", "ring"])
@pytest.mark.parametrize("kind", CHANNELS)
def test_a_host_killed_in_the_middle(kind: Kind, pattern: str, victim: int, tmp_path: Path) -> None:
    """Whoever dies with rows of others in its hands, the first of a message or a later one: they are sent again."""
    hidden_states = torch.randn(40, 16)
    expected = MoELayer(**WITH_IDENTITY)(hidden_states)
    with (
        ServiceHarness(config(pattern) | {"layers": [WITH_IDENTITY]}, kind, tmp_path, ["a", "a", "b", "b"]) as service,
        ThreadPoolExecutor() as pool,
    ):
        assert_close(ask(service, hidden_states).hidden_states, expected)
        held = Held(service.hosts[victim])
        held.error = Killed()
        answers = [pool.submit(ask, service, hidden_states) for _ in range(3)]
        assert held.begun.acquire(timeout=30)
        held.let_go()
        service.call(until_async(lambda: service.frontend._links[victim].restarts))  # started again by itself
        for answer in answers:
            assert_close(answer.result(timeout=30).hidden_states, expected)
        service.call(until_async(lambda: service.frontend.stats().hosts[victim].up and is_introduced(service, victim)))
        before = service.metrics.registry.get_sample_value("moeserve_expert_retries_total", {"reason": "host_lost"})
        assert_close(ask(service, hidden_states).hidden_states, expected)
        after = service.metrics.registry.get_sample_value("moeserve_expert_retries_total", {"reason": "host_lost"})
        assert before is not None and before > 0 and after == before, "the new incarnation has been introduced to the others"


@pytest.mark.parametrize("pattern", ["hierarchical", "ring"])
def test_hosts_that_have_not_met_are_asked_directly(pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden_states = torch.randn(40, 16)
    with ServiceHarness(config(pattern, on_expert_failure="fail"), "shm", tmp_path) as service:
        for host in service.hosts:
            host.host.relay.meet({})
            monkeypatch.setattr(host.host.relay, "meet", lambda directory: None)
        out = ask(service, hidden_states)
        assert_close(out.hidden_states, MoELayer(**LAYER)(hidden_states))
        assert service.metrics.registry.get_sample_value("moeserve_expert_retries_total", {"reason": "host_lost"}) == HOSTS
        assert service.metrics.registry.get_sample_value("moeserve_messages_total", {"pattern": "all_to_all"}) == HOSTS


@pytest.mark.parametrize("pattern", ["hierarchical", "ring"])
def test_what_is_known_to_be_down_harms_nobody_else(pattern: str, tmp_path: Path) -> None:
    """Rows for living hosts are answered at once, with no attempt to pass anything to the dead one."""
    with ServiceHarness(config(pattern), "shm", tmp_path) as service:
        service.hosts[1].stop()
        service.call(gone(service, 1))
        ids = torch.tensor([[0, 4], [5, 7]])  # hosts 0, 2 and 3
        request = LayerRequest(torch.randn(2, 16), topk_ids=ids, topk_weights=torch.ones(2, 2))
        assert service.call(service.frontend.forward(0, request)).processed.tolist() == [1, 0, 0, 0, 1, 1, 0, 1]
        assert service.metrics.registry.get_sample_value("moeserve_expert_retries_total", {"reason": "host_lost"}) == 0
        service.hosts[1].start()


@pytest.mark.parametrize("pattern", ["hierarchical", "ring"])
def test_a_host_that_hangs_ends_at_the_deadline_and_its_neighbours_go_on(pattern: str, tmp_path: Path) -> None:
    with ServiceHarness(config(pattern), "shm", tmp_path) as service:
        held = Held(service.hosts[2])
        with pytest.raises((DeadlineExceeded, ExpertUnavailable)):
            ask(service, torch.randn(40, 16), within_s=0.5)
        ids = torch.tensor([[0, 2], [3, 7]])
        request = LayerRequest(torch.randn(2, 16), topk_ids=ids, topk_weights=torch.ones(2, 2))
        assert service.call(service.frontend.forward(0, request)).processed.sum() == 4
        held.let_go()
        hidden_states = torch.randn(40, 16)
        assert_close(ask(service, hidden_states).hidden_states, MoELayer(**LAYER)(hidden_states))


def test_a_host_that_dies_while_the_frontend_looks_away_does_not_stop_it(tmp_path: Path) -> None:
    """The death is found by sending, before the event loop has heard of it: the frontend must still come round to hearing it."""
    with ServiceHarness(config("all_to_all"), "shm", tmp_path) as service:
        victim = service.hosts[1]  # experts 2 and 3: no other host's answer gives the loop a pause
        request = LayerRequest(torch.randn(2, 16), topk_ids=torch.tensor([[2], [3]]), topk_weights=torch.ones(2, 1))

        async def die_and_ask() -> ForwardOutput:
            victim.stop()  # blocks the loop, which so learns of nothing
            asyncio.get_running_loop().call_later(0.05, victim.start)
            return await service.frontend.forward(0, request)

        assert service.call(die_and_ask()).processed.tolist() == [0, 0, 1, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("pattern", ["all_to_all", "hierarchical"])
def test_what_hosts_owe_is_zero_again_however_a_batch_ends(pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting fails while the hosts are at work: the gauge does not keep what was sent, and the next request is answered."""
    with ServiceHarness(config(pattern), "shm", tmp_path) as service:

        def owed() -> list[float | None]:
            return [service.metrics.registry.get_sample_value("moeserve_host_queue_tokens", {"host": f"host-{n}"}) for n in range(HOSTS)]

        with monkeypatch.context() as broken:
            broken.setattr("moeserve.frontend.routed.RoutedBatch.requests", lambda routed: 1 / 0)
            with pytest.raises(Exception, match="ZeroDivisionError"):
                ask(service, torch.randn(40, 16))
        service.call(until_async(lambda: owed() == [0] * HOSTS))
        assert ask(service, torch.randn(40, 16)).processed.sum() == 80
