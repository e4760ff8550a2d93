"""A request that is larger than a batch runs in turns: its answer is the same, and others have their turns between."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from moeserve import Client, DeadlineExceeded, MoELayer
from moeserve.api.output import ForwardOutput
from moeserve.api.request import LayerRequest
from tests.support.closeness import assert_close
from tests.support.harness import ServiceHarness, received
from tests.support.held import Held
from tests.support.seen import gone
from tests.support.waiting import until

LAYER: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 8, "num_experts": 8, "gating": {"top_k": 3, "capacity_factor": 0.8}}
ROWS = torch.randn(2000, 16, generator=torch.Generator().manual_seed(3))
#: 512 tokens is the least of a turn
TURNS = 4


def config(**more: Any) -> dict[str, Any]:
    return {"layers": [LAYER], "placement": {"num_hosts": 2}, **more, "batching": {"max_batch_tokens": 64, **more.get("batching", {})}}


@pytest.mark.parametrize("pattern", ["all_to_all", "ring"])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_the_answer_is_that_of_the_whole(pattern: str, micro_batches: int, tmp_path: Path) -> None:
    """What its experts have room for is settled for all of its tokens together."""
    settings = config(batching={"micro_batches": micro_batches}, communication={"pattern": pattern})
    with ServiceHarness(settings, "local", tmp_path) as service:
        before = received(service.hosts[0])
        out = service.call(service.frontend.forward(0, LayerRequest(ROWS, return_routing=True)))
        expected = MoELayer(**LAYER).run(ROWS, return_routing=True)
        assert received(service.hosts[0]) - before == TURNS, "a micro-batch has 512 tokens at least, too"
        assert_close(out.hidden_states, expected.hidden_states)
        assert torch.equal(out.processed, expected.processed) and torch.equal(out.slots, expected.slots)
        assert int(out.dropped.sum()) > 0 and int(out.processed.sum()) == sum(service.frontend.stats().layers[0].processed)
        assert service.frontend.stats().queue_tokens == 0


def rows_of_the_first_host(hidden_states: torch.Tensor) -> list[int]:
    """Of each turn."""
    out = MoELayer(**LAYER).run(hidden_states, return_routing=True)
    assert out.topk_ids is not None and out.slots is not None
    is_needed = ((out.topk_ids < 4) & (out.slots >= 0)).any(dim=1)
    return [int(turn.sum()) for turn in is_needed.split(len(ROWS) // TURNS)]


def test_others_have_their_turns_between(tmp_path: Path) -> None:
    """Also of the same caller."""
    with ServiceHarness(config(), "local", tmp_path) as service, Client(service.target) as client, ThreadPoolExecutor() as pool:
        reference = MoELayer(**LAYER)
        held = Held(service.hosts[0])
        large = pool.submit(client.forward, ROWS, timeout=60)
        assert held.begun.acquire(timeout=30)
        small = pool.submit(client.forward, ROWS[:40])
        until(lambda: service.frontend.stats().queue_tokens == len(ROWS) + 40)
        held.let_go()
        assert_close(small.result().hidden_states, reference(ROWS[:40]))
        assert_close(large.result().hidden_states, reference(ROWS))
        # Alone, or in one pass with a turn of the large one, if the host had not begun that.
        (few,), turns = rows_of_the_first_host(ROWS[:40]), rows_of_the_first_host(ROWS)
        place = next(index for index, rows in enumerate(held.rows) if rows - few in {0, *turns})
        assert place <= 2, "two turns of the large one were under way"


@pytest.mark.parametrize("policy", ["retry", "residual"])
def test_a_host_that_dies_between_two_turns(policy: str, tmp_path: Path) -> None:
    settings = config(resilience={"on_expert_failure": policy, "partial_after_ms": 1500, "k_min": 0})
    with ServiceHarness(settings, "local", tmp_path) as service, Client(service.target) as client, ThreadPoolExecutor() as pool:
        answer = stopped_in_its_second_pass(service, client, pool)
        if policy == "retry":
            service.hosts[1].start()
            assert_close(answer.result(timeout=30).hidden_states, MoELayer(**LAYER)(ROWS))
            return
        out = answer.result(timeout=30)
        assert out.topk_ids is not None and out.topk_weights is not None and out.drops is not None
        lost = [drop for drop in out.drops if drop.reason != "capacity"]
        assert min(drop.token for drop in lost) >= 500 and {int(out.topk_ids[drop.token, drop.choice]) for drop in lost} == {4, 5, 6, 7}
        again = MoELayer(**LAYER).run(ROWS, topk_ids=out.topk_ids, topk_weights=out.topk_weights)
        assert_close(out.hidden_states, again.hidden_states)


def stopped_in_its_second_pass(service: ServiceHarness, client: Client, pool: ThreadPoolExecutor) -> Future[ForwardOutput]:
    held, loop = Held(service.hosts[1]), service.hosts[1].host._loop
    held.leave.release()
    answer = pool.submit(client.forward, ROWS, return_routing=True)
    assert all(held.begun.acquire(timeout=30) for _ in range(2))
    stopping = pool.submit(service.hosts[1].stop)
    until(lambda: loop._stopping)
    held.let_go()
    stopping.result(timeout=30)
    service.call(gone(service, 1))
    return answer


def test_a_caller_that_leaves_between_two_turns(tmp_path: Path) -> None:
    with ServiceHarness(config(), "local", tmp_path) as service, Client(service.target) as client, ThreadPoolExecutor() as pool:
        client.forward(ROWS[:1])
        held = Held(service.hosts[0])
        answer = pool.submit(client.forward, ROWS, timeout=2)
        assert held.begun.acquire(timeout=30)
        with pytest.raises(DeadlineExceeded):
            answer.result(timeout=30)
        until(lambda: service.frontend.stats().queue_tokens == 0)
        held.let_go()
        assert_close(client.forward(ROWS).hidden_states, MoELayer(**LAYER)(ROWS))
        until(lambda: service.frontend._admission.backlog.is_idle)
