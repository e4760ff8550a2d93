"""Answers without choices whose experts are lost or late: what is missing is said, and the rest is exact."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from moeserve import Client, DeadlineExceeded, ExpertUnavailable, MoELayer
from moeserve.api.output import ForwardOutput
from moeserve.api.request import LayerRequest
from moeserve.checkpoints import load_bank
from moeserve.experts import ExpertBank
from moeserve.layer import head
from tests.support.closeness import assert_close
from tests.support.harness import Killed, ServiceHarness
from tests.support.held import Held
from tests.support.seen import gone
from tests.support.waiting import until

LAYER: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 8, "num_experts": 8, "gating": {"top_k": 3}}
ROWS = torch.randn(40, 16, generator=torch.Generator().manual_seed(3))
POLICIES = ("renormalize", "residual")
#: a busy machine stops hosts for some tenths of a second: the others are not late
PATIENCE_MS = 1000
#: on host-1 of four
LOST = {2, 3}


def config(policy: str, **resilience: Any) -> dict[str, Any]:
    layer = resilience.pop("layer", LAYER)
    placement = {"num_hosts": 4, **resilience.pop("placement", {})}
    rules = {"on_expert_failure": policy, "partial_after_ms": PATIENCE_MS, **resilience}
    return {"layers": [layer], "placement": placement, "resilience": rules}


def check(out: ForwardOutput, policy: str, reason: str) -> None:
    """What is missing is said, and the layer computes the same from the answer's own routing."""
    full = MoELayer(**LAYER).run(ROWS, return_routing=True)
    assert out.topk_ids is not None and out.topk_weights is not None and out.drops is not None
    assert full.topk_ids is not None and full.topk_weights is not None
    missing = torch.isin(full.topk_ids, torch.tensor(sorted(LOST)))
    assert missing.any() and torch.equal(out.topk_ids, full.topk_ids)
    assert {(drop.token, drop.choice, drop.reason) for drop in out.drops} == {(t, k, reason) for t, k in missing.nonzero().tolist()}
    assert torch.equal(out.dropped_tokens, missing.any(dim=1))
    assert torch.equal(out.dropped, full.topk_ids[missing].bincount(minlength=8))
    assert torch.equal(out.processed + out.dropped, full.requested)
    assert (out.topk_weights[missing] == 0).all()
    kept = full.topk_weights * ~missing
    if policy == "renormalize":
        kept = kept * (full.topk_weights.sum(dim=1) / kept.sum(dim=1))[:, None]
    torch.testing.assert_close(out.topk_weights, kept)
    again = MoELayer(**LAYER).run(ROWS, topk_ids=out.topk_ids, topk_weights=out.topk_weights)
    assert_close(out.hidden_states, again.hidden_states)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_host_that_is_gone(policy: str, tmp_path: Path) -> None:
    with ServiceHarness(config(policy), "shm", tmp_path) as service, Client(service.target) as client:
        service.hosts[1].stop()
        service.call(gone(service, 1))
        for _ in range(2):  # given up under way, and known to be gone when the batch is planned
            check(client.forward(ROWS, return_routing=True), policy, "host_lost")
        sample = service.metrics.registry.get_sample_value
        assert sample("moeserve_partial_answers_total", {"policy": policy}) == 2
        dropped = {"layer": "layers.0", "expert": "2", "reason": "host_lost"}
        assert (sample("moeserve_expert_dropped_tokens_total", dropped) or 0) > 0
        service.hosts[1].start()
        service.call(service.frontend._links[1].connected())
        assert_close(client.forward(ROWS).hidden_states, MoELayer(**LAYER)(ROWS))


@pytest.mark.parametrize("policy", POLICIES)
def test_a_host_that_is_late(policy: str, tmp_path: Path) -> None:
    with ServiceHarness(config(policy), "local", tmp_path) as service, Client(service.target) as client:
        held = Held(service.hosts[1])
        check(client.forward(ROWS, return_routing=True), policy, "late")
        held.let_go()


@pytest.mark.parametrize("hedge", ["off", "auto"])
def test_both_copies_are_late(hedge: str, tmp_path: Path) -> None:
    """Whoever has both copies stands still: the second one is asked, too, and not waited for much longer than the first."""
    settings = config("residual", hedge=hedge, placement={"copies": 2})
    with ServiceHarness(settings, "local", tmp_path) as service, Client(service.target) as client:
        for _ in range(40):
            client.forward(ROWS)
        places = service.placement.layers[0]
        hosts_of = [{int(host) for host in places.host_of_physical[places.logical_of_physical == expert]} for expert in range(8)]
        elsewhere = next(expert for expert in range(8) if not hosts_of[expert] & hosts_of[0])
        held = [Held(service.hosts[number]) for number in hosts_of[0]]
        ids, weights = torch.tensor([[0, elsewhere]]), torch.full((1, 2), 0.5)
        out = client.forward(ROWS[:1], topk_ids=ids, topk_weights=weights, return_routing=True, timeout=20)
        assert [(drop.choice, drop.reason) for drop in out.drops or ()] == [(0, "late")]
        alone = MoELayer(**LAYER).run(ROWS[:1], topk_ids=ids[:, 1:], topk_weights=weights[:, 1:])
        assert_close(out.hidden_states, alone.hidden_states)
        assert all(one.begun.acquire(timeout=30) for one in held), "both were asked"
        for one in held:
            one.let_go()


@pytest.mark.parametrize("late", [0, 1, 3], ids=["passes on", "in between", "last"])
@pytest.mark.parametrize("pattern", ["ring", "hierarchical"])
def test_a_host_that_is_late_behind_others(pattern: str, late: int, tmp_path: Path) -> None:
    """Rows that hosts pass on to each other are sent to each of them, so that it shows who is late."""
    settings = config("residual", k_min=0) | {"communication": {"pattern": pattern}}
    with ServiceHarness(settings, "local", tmp_path) as service, Client(service.target) as client:
        held = Held(service.hosts[late])
        out = client.forward(ROWS, return_routing=True, timeout=10)
        assert out.drops and {drop.reason for drop in out.drops} == {"late"}
        assert out.dropped.nonzero().flatten().tolist() == [2 * late, 2 * late + 1], "its experts, and no others"
        again = MoELayer(**LAYER).run(ROWS, topk_ids=out.topk_ids, topk_weights=out.topk_weights)
        assert_close(out.hidden_states, again.hidden_states)
        held.let_go()


@pytest.mark.parametrize("pattern", ["ring", "hierarchical"])
def test_the_host_that_passes_rows_on_is_gone(pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows in its hands that are others' are sent to those, and only its own choices are given up."""
    with ServiceHarness(config("residual") | {"communication": {"pattern": pattern}}, "local", tmp_path) as service:
        monkeypatch.setattr(service.hosts[0], "start", lambda: None)
        held = Held(service.hosts[0])
        held.error = Killed()
        ids, weights = torch.tensor([[0, 2, 4], [1, 3, 6]]), torch.full((2, 3), 1 / 3)
        request = LayerRequest(ROWS[:2], topk_ids=ids, topk_weights=weights, return_routing=True)
        with ThreadPoolExecutor() as callers:
            answer = callers.submit(lambda: service.call(service.frontend.forward(0, request)))
            assert held.begun.acquire(timeout=30)
            held.let_go()
            out = answer.result(30)
        assert {(drop.token, drop.choice, drop.reason) for drop in out.drops or ()} == {(0, 0, "host_lost"), (1, 0, "host_lost")}
        again = MoELayer(**LAYER).run(ROWS[:2], topk_ids=ids, topk_weights=out.topk_weights)
        assert_close(out.hidden_states, again.hidden_states)


def test_an_answer_that_comes_while_others_are_sent_again(tmp_path: Path) -> None:
    """Both messages are late; the second one is answered while the rows of the first are written once more, which takes a thread."""
    layer = LAYER | {"hidden_size": 64}
    rows = torch.randn(2100, 64, generator=torch.Generator().manual_seed(4))
    settings = config("residual", partial_after_ms=2 * PATIENCE_MS, k_min=3, layer=layer) | {"communication": {"pattern": "hierarchical"}}
    with ServiceHarness(settings, "local", tmp_path, ["a", "a", "b", "b"]) as service, ThreadPoolExecutor() as callers:
        first, second, written = Held(service.hosts[0]), Held(service.hosts[2]), threading.Event()
        answer = callers.submit(lambda: service.call(service.frontend.forward(0, LayerRequest(rows))))
        assert first.begun.acquire(timeout=30) and second.begun.acquire(timeout=30)
        service.call(asyncio.sleep(0))
        writer = service.frontend._compute._pool
        writer.submit(written.wait, 60)
        until(lambda: writer._work_queue.qsize() and service.frontend._links[1].queue_tokens == 0)  # given up, and about to be sent again
        second.let_go()
        until(lambda: service.frontend._links[2].queue_tokens == 0)
        first.let_go()
        written.set()
        assert_close(answer.result(30).hidden_states, MoELayer(**layer)(rows))


def test_a_shared_expert_that_travels_alone(tmp_path: Path) -> None:
    layer = LAYER | {"shared_expert": {"intermediate_size": 8}}
    settings = config("residual", k_min=0, layer=layer) | {"communication": {"pattern": "point_to_point"}}
    with ServiceHarness(settings, "local", tmp_path) as service, Client(service.target) as client:
        for number in (0, 1):
            held = Held(service.hosts[number])
            out = client.forward(ROWS, timeout=10)
            assert out.dropped.nonzero().flatten().tolist() == [2 * number, 2 * number + 1]
            held.let_go()


def test_a_host_that_errs(tmp_path: Path) -> None:
    with ServiceHarness(config("residual"), "local", tmp_path) as service, Client(service.target) as client:
        held = Held(service.hosts[1])
        held.error = ValueError("a kernel failed")
        held.let_go()
        check(client.forward(ROWS, return_routing=True), "residual", "host_lost")


@pytest.mark.parametrize("more", [{"shared_expert": {"intermediate_size": 8}}, {"identity_experts": 2}], ids=["shared", "identity"])
@pytest.mark.parametrize("tensor_parallel", [1, 2])
@pytest.mark.parametrize("policy", POLICIES)
def test_what_needs_no_lost_host_stays(policy: str, tensor_parallel: int, more: dict[str, Any], tmp_path: Path) -> None:
    """A shared expert, experts without weights, shards of experts that others still have: nothing is there twice, and nothing is half."""
    layer = LAYER | more
    settings = config(policy, layer=layer, placement={"tensor_parallel": tensor_parallel}, k_min=0, partial_after_ms=100)
    with ServiceHarness(settings, "local", tmp_path) as service, Client(service.target) as client:
        service.hosts[3].stop()
        service.call(gone(service, 3))
        out = client.forward(ROWS, return_routing=True)
        assert out.topk_ids is not None and out.topk_weights is not None and out.drops
        reference = MoELayer(**layer)
        expected = reference.run(ROWS, topk_ids=out.topk_ids, topk_weights=out.topk_weights).hidden_states
        if "shared_expert" in more:
            whole = reference.run(ROWS, return_routing=True)
            assert whole.topk_ids is not None and whole.topk_weights is not None
            routed = reference.run(ROWS, topk_ids=whole.topk_ids, topk_weights=whole.topk_weights).hidden_states
            expected = expected + (whole.hidden_states - routed)
        assert_close(out.hidden_states, expected, summed=400)


@pytest.mark.parametrize("k_min", [0, 1, 2])
def test_with_fewer_than_k_min_it_waits(k_min: int, tmp_path: Path) -> None:
    ids = torch.tensor([[2, 3], [2, 0], [4, 5]])
    weights = torch.full((3, 2), 0.5)
    settings = config("residual", k_min=k_min, partial_after_ms=100, layer=LAYER | {"gating": {"top_k": 2}})
    with ServiceHarness(settings, "local", tmp_path) as service, Client(service.target) as client:
        service.hosts[1].stop()
        service.call(gone(service, 1))

        def ask(token: int, timeout: float) -> ForwardOutput:
            one = slice(token, token + 1)
            return client.forward(ROWS[one], topk_ids=ids[one], topk_weights=weights[one], timeout=timeout, return_routing=True)

        left = {0: 0, 1: 1, 2: 2}
        for token, remaining in left.items():
            if remaining >= k_min or token == 2:
                assert int(ask(token, 30.0).processed.sum()) == remaining
            else:
                with pytest.raises((ExpertUnavailable, DeadlineExceeded)):
                    ask(token, 1.0)
        # One such token holds up its own request only.
        if k_min < 2:
            out = client.forward(ROWS[1:], topk_ids=ids[1:2].expand(39, 2), topk_weights=weights[:1].expand(39, 2))
            assert int(out.processed.sum()) == 39


def test_of_two_lost_hosts_the_one_that_is_back_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without both there would be fewer than k_min choices, so both are waited for, until one has answered."""
    ids, weights = torch.tensor([[2, 4, 6]]), torch.full((1, 3), 1 / 3)
    with ServiceHarness(config("residual", k_min=2, partial_after_ms=0), "local", tmp_path) as service, ThreadPoolExecutor() as callers:
        for number in (1, 2):
            monkeypatch.setattr(service.hosts[number], "start", lambda: None)
            service.hosts[number].stop()
            service.call(gone(service, number))
        request = LayerRequest(ROWS[:1], topk_ids=ids, topk_weights=weights, return_routing=True)
        answer = callers.submit(lambda: service.call(service.frontend.forward(0, request)))
        deliveries = service.frontend._forwards[0]._deliveries
        until(lambda: [parcel.is_must for delivery in list(deliveries) for parcel in delivery.owed] == [True, True])
        monkeypatch.undo()
        service.hosts[2].start()
        out = answer.result(30)
        assert [(drop.choice, drop.reason) for drop in out.drops or ()] == [(0, "host_lost")]
        again = MoELayer(**LAYER).run(ROWS[:1], topk_ids=ids, topk_weights=out.topk_weights)
        assert_close(out.hidden_states, again.hidden_states)


def test_layers_may_differ(tmp_path: Path) -> None:
    layers = [LAYER, LAYER | {"resilience": {"on_expert_failure": "residual", "partial_after_ms": 0}}]
    settings = {"layers": layers, "placement": {"num_hosts": 4}, "resilience": {"on_expert_failure": "fail"}}
    with ServiceHarness(settings, "local", tmp_path) as service, Client(service.target) as client:
        service.hosts[1].stop()
        service.call(gone(service, 1))
        with pytest.raises(ExpertUnavailable, match="were lost with host-1"):
            client.forward(ROWS, layer=0)
        assert client.forward(ROWS, layer=1).dropped.sum() > 0


def test_reading_the_shared_expert_holds_up_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A frontend reads it when the first token needs it that no host sees."""
    begun, leave = threading.Event(), threading.Event()

    def slow(*arguments: Any) -> ExpertBank:
        begun.set()
        assert leave.wait(30)
        return load_bank(*arguments)

    monkeypatch.setattr(head, "load_bank", slow)
    layer = LAYER | {"shared_expert": {"intermediate_size": 8}}
    settings = config("residual", layer=layer, placement={"num_hosts": 1}, k_min=0, partial_after_ms=0)
    with ServiceHarness(settings, "local", tmp_path) as service, Client(service.target) as client, ThreadPoolExecutor() as pool:
        service.hosts[0].stop()
        service.call(gone(service, 0))
        answer = pool.submit(client.forward, ROWS)
        assert begun.wait(30)
        assert not client.stats().hosts[0].up
        leave.set()
        assert int(answer.result(30).processed.sum()) == 0
