"""A host that answers with errors, or with numbers that are none: other copies answer, and it is left alone until a canary comes back."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moeserve import Client, MoELayer, MoEServeError
from moeserve.api.output import ForwardOutput
from moeserve.api.request import LayerRequest
from moeserve.errors import ExpertUnavailable, NonFiniteOutput
from moeserve.frontend import timing
from moeserve.frontend.canary import Canary
from tests.support.closeness import assert_close
from tests.support.harness import CHANNELS, Killed, Kind, ServiceHarness, received
from tests.support.held import Held, Poisoned
from tests.support.waiting import until, until_async

LAYER: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 8, "num_experts": 8, "gating": {"top_k": 2}}
ROWS = torch.randn(40, 16, generator=torch.Generator().manual_seed(5))


def config(copies: int = 2, **resilience: Any) -> dict[str, Any]:
    return {"layers": [LAYER], "placement": {"num_hosts": 4, "copies": copies}, "resilience": resilience}


def poisoned(service: ServiceHarness, number: int) -> Poisoned:
    bank = Poisoned(service.hosts[number])
    bank.let_go()
    return bank


def state(service: ServiceHarness, number: int) -> str:
    return service.frontend.stats().hosts[number].state


@pytest.mark.parametrize("kind", CHANNELS)
def test_sums_that_are_not_finite_are_asked_of_another_copy(kind: Kind, tmp_path: Path) -> None:
    with ServiceHarness(config(), kind, tmp_path) as service, Client(service.target) as client:
        bank = poisoned(service, 1)
        expected = MoELayer(**LAYER)(ROWS)
        for _ in range(12):
            assert_close(client.forward(ROWS).hidden_states, expected)
        assert state(service, 1) == "out", "it has erred repeatedly"
        sample = service.metrics.registry.get_sample_value
        retried = sample("moeserve_expert_retries_total", {"reason": "non_finite"})
        assert retried is not None and 3 <= retried <= 6, "rows go elsewhere once it is known"
        assert sample("moeserve_host_state", {"host": "host-1", "state": "out"}) == 1
        assert "host_out" in [event.kind for event in service.metrics.events.latest()]
        bank.is_cured = True
        service.call(until_async(lambda: state(service, 1) == "up"))
        assert_close(client.forward(ROWS).hidden_states, expected)


def test_rows_that_overflow_everywhere_blame_nobody(tmp_path: Path) -> None:
    with ServiceHarness(config(), "local", tmp_path) as service, Client(service.target) as client:
        for _ in range(12):
            with pytest.raises(NonFiniteOutput, match="computed by expert"):
                client.forward(ROWS * 1e30)
            assert_close(client.forward(ROWS).hidden_states, MoELayer(**LAYER)(ROWS))
        assert "host_out" not in [event.kind for event in service.metrics.events.latest()]


def test_a_row_that_overflows_blames_nobody_for_the_rows_beside_it(tmp_path: Path) -> None:
    """It is in one message with others, whose copies are elsewhere than its own and answer with finite sums."""
    with ServiceHarness(config(), "local", tmp_path) as service, Client(service.target) as client:
        rows = torch.cat([ROWS[:1] * 1e30, ROWS[1:]])
        for _ in range(12):
            with pytest.raises(NonFiniteOutput, match="token 0 "):
                client.forward(rows)
        assert "host_out" not in [event.kind for event in service.metrics.events.latest()]


def test_sums_that_overflow_where_experts_are_together_blame_nobody(tmp_path: Path) -> None:
    """One host has both experts of a token; their copies are apart, and what each of these says is finite."""
    with ServiceHarness(config(), "local", tmp_path) as service, Client(service.target) as client:
        places = service.placement.layers[0]
        hosts_of = [{int(host) for host in places.host_of_physical[places.logical_of_physical == expert]} for expert in range(8)]
        pair = next([a, b] for a in range(8) for b in range(8) if 0 in hosts_of[a] & hosts_of[b] and len(hosts_of[a] | hosts_of[b]) == 3)
        rows, one = ROWS * 1e3, torch.ones(40, 1)
        said = [MoELayer(**LAYER).run(rows, topk_ids=one.long() * expert, topk_weights=one).hidden_states for expert in pair]
        shares = torch.stack([each / each.abs().amax(dim=1, keepdim=True) for each in said])
        token = int((shares[0] * shares[1]).amax(dim=1).argmax())
        weights = torch.tensor([[3e38 / float(each[token].abs().max()) for each in said]])

        async def owe(number: int) -> None:
            service.frontend._links[number].count_until(asyncio.get_running_loop().create_future(), 2**20)

        for number in (1, 2, 3):
            service.call(owe(number))
        for _ in range(12):
            with pytest.raises(NonFiniteOutput):
                client.forward(rows[token : token + 1], topk_ids=torch.tensor([pair]), topk_weights=weights)
        assert service.metrics.registry.get_sample_value("moeserve_expert_retries_total", {"reason": "non_finite"})
        assert "host_out" not in [event.kind for event in service.metrics.events.latest()]


@pytest.mark.parametrize("pattern", ["ring", "hierarchical"])
@pytest.mark.parametrize("fault", ["sums that are not finite", "an exception"])
def test_behind_a_host_that_passes_rows_on(fault: str, pattern: str, tmp_path: Path) -> None:
    """The host that answers for it is not at fault, and its copies are as good as others."""
    settings = config() | {"placement": {"num_hosts": 3, "copies": 2}, "communication": {"pattern": pattern}}
    with ServiceHarness(settings, "local", tmp_path) as service, Client(service.target) as client:
        held = Poisoned(service.hosts[1])
        if fault == "an exception":
            held.error = ValueError("a kernel failed")
        held.let_go()
        for _ in range(12):
            assert_close(client.forward(ROWS).hidden_states, MoELayer(**LAYER)(ROWS))
        assert [state(service, number) for number in range(3)] == ["up", "out", "up"]


@pytest.mark.parametrize("error", [ValueError, SystemExit])
@pytest.mark.parametrize("kind", CHANNELS)
def test_an_exception_in_a_kernel(kind: Kind, error: type[BaseException], tmp_path: Path) -> None:
    with ServiceHarness(config(), kind, tmp_path) as service, Client(service.target) as client:
        held = Held(service.hosts[2])
        held.error = error("a kernel failed")
        held.let_go()
        for _ in range(12):
            assert_close(client.forward(ROWS).hidden_states, MoELayer(**LAYER)(ROWS))
        assert state(service, 2) == "out"
        held.error = None
        service.call(until_async(lambda: state(service, 2) == "up"))


def test_a_canary_is_of_the_layers_that_a_host_has_erred_in(tmp_path: Path) -> None:
    with ServiceHarness(config() | {"layers": [LAYER, LAYER]}, "local", tmp_path) as service, Client(service.target) as client:
        held = Held(service.hosts[2], layer=1)
        held.error = ValueError("a kernel failed")
        held.let_go()
        while state(service, 2) != "out":
            assert_close(client.forward(ROWS, layer=1).hidden_states, MoELayer(**LAYER)(ROWS))
        while held.begun.acquire(blocking=False):
            pass
        assert held.begun.acquire(timeout=30), "nobody else asks it"
        assert state(service, 2) == "out"
        held.error = None
        service.call(until_async(lambda: state(service, 2) == "up"))


def test_a_host_that_starts_again_while_its_canary_pauses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "CANARY_S", 600.0)
    with ServiceHarness(config(), "local", tmp_path) as service:
        link, failed = service.frontend._links[1], threading.Event()

        async def fails(*_: object) -> None:
            failed.set()
            raise ExpertUnavailable("it cannot compute")

        tried, link._dial = link._dial, replace(link._dial, canary=fails)
        service.hosts[1].kill()
        assert failed.wait(30)
        link._dial = tried
        service.hosts[1].kill()
        service.call(until_async(lambda: state(service, 1) == "up" and link.restarts == 2))


def test_a_canary_has_time_for_each_of_the_layers_that_a_host_has_erred_in(tmp_path: Path) -> None:
    with ServiceHarness(config() | {"layers": [LAYER] * 3}, "local", tmp_path) as service:
        link = service.frontend._links[2]
        whole_s = timing.STUCK_HANGS * 0.01

        async def slow(_: object, layers: Collection[int]) -> None:
            assert len(layers) == 3
            await asyncio.sleep(1.2 * whole_s)  # of three times as much

        async def err() -> None:
            link._dial = replace(link._dial, canary=slow, hang_after_s=0.01)
            for layer in range(3):
                link.erred(layer)

        service.call(err())
        service.call(until_async(lambda: state(service, 2) == "up"))


def test_without_a_copy_the_error_is_told(tmp_path: Path) -> None:
    with ServiceHarness(config(copies=1), "local", tmp_path) as service, Client(service.target) as client:
        held = Held(service.hosts[2])
        held.error = ValueError("a kernel failed")
        held.let_go()
        for _ in range(5):  # also while its breaker is open: nobody else can be asked
            with pytest.raises(MoEServeError, match="the expert host failed to compute layer 0: ValueError"):
                client.forward(ROWS)
        held.error = None
        assert_close(client.forward(ROWS).hidden_states, MoELayer(**LAYER)(ROWS))


def test_a_malformed_packet(tmp_path: Path) -> None:
    with ServiceHarness(config(), "shm", tmp_path) as service, Client(service.target) as client:
        link = service.frontend._links[0]
        service.call(_break_the_protocol(link))
        assert_close(client.forward(ROWS).hidden_states, MoELayer(**LAYER)(ROWS))
        service.call(until_async(lambda: state(service, 0) == "up"))


async def _break_the_protocol(link: Any) -> None:
    link.channel._take_in(b"\xff nonsense", None)


def test_sums_that_are_not_finite_are_found_before_the_others_of_a_batch_are_told_apart(tmp_path: Path) -> None:
    """One host answers NaN, another is lost, a third still computes: the request of the first is not answered without its experts."""
    with ServiceHarness(config(copies=1), "local", tmp_path) as service:
        poison, killed, slow = (kind(service.hosts[number]) for number, kind in enumerate((Poisoned, Held, Held)))
        killed.error = Killed()

        async def submit() -> list[asyncio.Future[ForwardOutput]]:
            with service.frontend.together():
                return [service.frontend.submit(0, request) for request in requests]

        ids = [torch.tensor([[2 * host, 2 * host + 1]]) for host in range(3)]
        requests = [LayerRequest(ROWS[:1], topk_ids=each, topk_weights=torch.full((1, 2), 0.5)) for each in ids]
        answers = service.call(submit())
        assert all(held.begun.acquire(timeout=30) for held in (poison, killed, slow))
        poison.let_go()
        until(lambda: service.frontend._links[0].queue_tokens == 0)
        killed.let_go()
        until(lambda: service.frontend._links[1].restarts)
        slow.let_go()
        with pytest.raises(NonFiniteOutput):
            service.call(ended(answers[0]))
        for each, answer in zip(ids[1:], answers[1:], strict=True):
            again = MoELayer(**LAYER).run(ROWS[:1], topk_ids=each, topk_weights=torch.full((1, 2), 0.5))
            assert_close(service.call(ended(answer)).hidden_states, again.hidden_states)


async def ended(answer: asyncio.Future[ForwardOutput]) -> ForwardOutput:
    return await answer


def test_a_canary_does_not_ask_a_host_that_is_behind_without_a_pause(tmp_path: Path) -> None:
    with ServiceHarness(config(copies=1), "local", tmp_path) as service:
        forward, host = service.frontend._forwards[0], service.hosts[0]
        host.host.holdings.withdraw(0)
        before, view = received(host), forward.views.current
        with pytest.raises(ExpertUnavailable, match="did not answer a canary"):
            service.call(Canary(forward.exchange).try_release(view, view, time.monotonic() + 0.3))
        assert received(host) - before <= 4
