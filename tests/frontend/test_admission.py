"""Who gets in and what runs next, on a clock that the test moves."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeserve.api.request import LayerRequest
from moeserve.config import BatchingConfig
from moeserve.errors import ExpertUnavailable, Overloaded
from moeserve.frontend.admission import Admission
from moeserve.frontend.batch import Batch
from moeserve.frontend.batch_cost import BatchCost
from moeserve.frontend.batcher import Batcher
from tests.support.fake_hosts import FakeHosts, FakeRequest
from tests.support.waiting import until_async

#: seconds of a batch without tokens and of a token, tokens of a request
KINDS = {"small batches": (1e-3, 2e-5, 128), "slow tokens": (2e-3, 5e-5, 64), "large requests": (1e-3, 1e-4, 512)}


@pytest.mark.parametrize("alone", [False, True], ids=["joined", "each in a batch of its own"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("multiple", [1.5, 8])
def test_the_more_is_offered_the_more_is_refused_and_the_rest_is_answered_in_time(multiple: float, kind: str, alone: bool) -> None:
    fixed_s, token_s, tokens = KINDS[kind]
    capacity = 1 / (fixed_s + token_s * tokens)
    hosts = FakeHosts(fixed_s=fixed_s, token_s=token_s)
    for number in range(4):
        hosts.flood(f"caller-{number}", capacity * multiple / 4, tokens, 1.0, until=4, alone=alone)
    hosts.run(6)
    assert hosts.ended("answered") >= 0.9 * 4 * capacity
    assert hosts.ended("expired") + hosts.ended("late") <= 0.05 * sum(hosts.ends.values()) + 20, "refused at once, not in the end"
    assert hosts.admission.tokens == 0 and hosts.backlog.is_idle


def test_after_a_flood_everything_is_as_before() -> None:
    hosts = FakeHosts()
    hosts.flood("many", 8_000, 128, 1.0, until=2)
    hosts.run(2)
    assert hosts.ends["many", "refused"]
    hosts.run(3)
    hosts.submit("one", 128, 0.05)
    hosts.run(4)
    assert hosts.ends == {**hosts.ends, ("one", "answered"): 1}
    assert hosts.latencies_ms["one"][0] < 5


@pytest.mark.parametrize("greedy_layers", [(0,), (1,), (0, 1, 2, 3)], ids=["the same layer", "another layer", "all layers"])
@pytest.mark.parametrize("tokens", [32, 512])
def test_a_small_caller_hardly_notices_a_greedy_one(tokens: int, greedy_layers: tuple[int, ...]) -> None:
    alone = FakeHosts(layers=4)
    alone.keep_asking("small", 1, 1)
    alone.run(0.5)
    hosts = FakeHosts(layers=4)
    for layer in greedy_layers:
        hosts.keep_asking("greedy", tokens, 64, layer)
    hosts.at(0.5, lambda: hosts.keep_asking("small", 1, 1))
    hosts.run(1.5)
    assert hosts.p50_ms("small") <= 8 * alone.p50_ms("small")
    assert not hosts.ends["small", "refused"] and not hosts.ends["small", "late"]
    assert hosts.ends["greedy", "answered"] > 100


def test_who_has_only_been_refused_makes_nobody_greedy() -> None:
    hosts = FakeHosts(max_batch_tokens=4096)
    hosts.keep_asking("only", 512, 64)
    for when in range(1, 20):
        hosts.at(0.1 * when, lambda: hosts.submit("too late", 1, deadline_s=1e-4))
    hosts.run(2)
    sizes = [sum(turn.tokens for turn in batch) for batch in hosts.batches[-20:]]
    assert hosts.ends["too late", "refused"] == 19 and max(sizes) == 4096 and sum(sizes) / len(sizes) > 2048


def test_two_callers_who_both_want_more_get_the_same() -> None:
    hosts = FakeHosts(max_batch_tokens=1024)
    hosts.keep_asking("a few large", 512, 8)
    hosts.keep_asking("many small", 16, 256)
    hosts.run(1)
    tokens = {"a few large": 512 * hosts.ends["a few large", "answered"], "many small": 16 * hosts.ends["many small", "answered"]}
    assert max(tokens.values()) <= 1.3 * min(tokens.values())


def test_one_caller_alone_gets_full_batches() -> None:
    hosts = FakeHosts(max_batch_tokens=4096)
    hosts.keep_asking("only", 512, 64)
    hosts.run(2)
    sizes = [sum(turn.tokens for turn in batch) for batch in hosts.batches[-20:]]
    assert max(sizes) == 4096 and sum(sizes) / len(sizes) > 2048


@pytest.mark.parametrize("callers", [2, 3, 8, 33])
def test_requests_that_come_back_one_by_one_end_up_in_two_batches_of_the_same_size(callers: int) -> None:
    hosts = FakeHosts(fixed_s=5e-3)
    for number in range(callers):
        hosts.at(1e-4 * number, partial(hosts.keep_asking, f"caller-{number}", 64, 1))
    hosts.run(2)
    sizes = [len(batch) for batch in hosts.batches[-20:]]
    assert min(sizes) >= callers // 2 and max(sizes) <= callers - callers // 2


def test_a_small_batch_behind_a_large_one_is_sent_when_the_hosts_are_about_to_have_nothing_to_do() -> None:
    hosts = FakeHosts(fixed_s=0.0, token_s=1e-3)
    for _ in range(3):  # what batches cost has to be learned
        hosts.submit("caller", 1000)
        hosts.run(hosts.now + 2)
    load = hosts.loads[0]
    load.send_s, began = 0.1, hosts.now
    hosts.submit("caller", 1000)
    hosts.submit("caller", 1)
    assert len(hosts.batches) == 4 and hosts.backlog.ready_at(load, began) == pytest.approx(began + 0.9, abs=0.01)
    hosts.run(began + 0.95)
    assert [sum(turn.tokens for turn in batch) for batch in hosts.batches[3:]] == [1000, 1]


def test_what_is_due_first_runs_first() -> None:
    hosts = FakeHosts(max_batch_tokens=1)
    for deadline_s in (9.0, 8.0, 7.0, 3.0, 5.0, 4.0):
        hosts.submit("caller", 1, deadline_s)
    hosts.run(1)
    assert [batch[0].request.deadline for batch in hosts.batches] == [9.0, 8.0, 3.0, 4.0, 5.0, 7.0], "two were on their way"


def test_a_batch_is_no_larger_than_its_most_urgent_member_can_wait_for() -> None:
    hosts = FakeHosts()
    load = hosts.loads[0]
    for tokens in (100, 8000) * 20:
        load.cost.learn(tokens, 1e-4 * tokens)
    for tokens, deadline in (*[(100, 60.0)] * 80, (10, 0.4)):
        load.queue.add(FakeRequest(hosts.admission.admit(load, "caller", tokens, 1e9, 0), tokens, deadline, 0), 0.0)
    batch, late = hosts.backlog.next_batch(load, 0)
    assert not late and batch[0].request.deadline == 0.4
    assert 1500 < sum(turn.tokens for turn in batch) <= 2000, "they take 0.2 s"
    batch, _ = hosts.backlog.next_batch(load, 0)
    assert sum(turn.tokens for turn in batch) > 5000


def test_one_caller_may_fill_the_queue_and_makes_room_for_others() -> None:
    hosts = FakeHosts(token_s=1.0)
    for _ in range(10):
        hosts.submit("greedy", 65536, 1e9)
    assert hosts.ends["greedy", "refused"] == 6
    hosts.submit("small", 1, 1e9)
    assert hosts.ends["greedy", "pushed out"] == 1 and hosts.admission.tokens == 3 * 65536 + 1
    hosts.submit("large", 65536, 1e9)
    assert hosts.ends["greedy", "pushed out"] == 2 and not hosts.ends["small", "refused"] and not hosts.ends["large", "refused"]
    hosts.submit("third", 2 * 65536, 1e9)
    assert hosts.ends["third", "refused"] == 1, "it would hold more than anybody else"
    assert hosts.ends["greedy", "pushed out"] == 2


@pytest.mark.parametrize("layer", [0, 1], ids=["the same layer", "another layer"])
def test_small_requests_do_not_wait_for_the_largest(layer: int) -> None:
    alone = FakeHosts(layers=2)
    alone.keep_asking("small", 1, 1, layer)
    alone.run(0.5)
    hosts = FakeHosts(layers=2)
    hosts.keep_asking("greedy", 65536, 6)
    hosts.at(1.0, lambda: hosts.keep_asking("small", 1, 1, layer))
    hosts.run(4)
    assert hosts.p50_ms("small") <= 8 * alone.p50_ms("small")
    assert not hosts.ends["small", "refused"] and not hosts.ends["small", "late"]
    assert hosts.ends["greedy", "answered"] >= 2 * 0.6 * 2 / (1e-5 * 65536) / 2, "it runs at more than half of its speed"


def test_small_requests_of_one_caller_do_not_wait_for_its_large_ones() -> None:
    """All have the same time; what takes 655 ms has its turn before the small ones that come so much later."""
    hosts = FakeHosts()
    hosts.keep_asking("same", 1, 2)
    for number in range(10):
        hosts.at(1 + number, lambda: hosts.submit("same", 65536, 60.0))
    hosts.run(12)
    assert hosts.p50_ms("same") < 200 and max(hosts.latencies_ms["same"]) < 2000
    assert sum(turn.request.tokens == 65536 for batch in hosts.batches for turn in batch) == 10 * 8


def test_a_large_request_runs_in_turns_of_the_same_size() -> None:
    hosts = FakeHosts(max_batch_tokens=1024)
    hosts.submit("only", 10_000)
    hosts.run(1)
    assert {sum(turn.tokens for turn in batch) for batch in hosts.batches} == {1000}
    assert hosts.ends == {("only", "answered"): 1} and hosts.admission.tokens == 0


def test_what_can_never_fit_is_not_asked_to_come_back() -> None:
    hosts = FakeHosts()
    with pytest.raises(Overloaded, match=r"262145 tokens are more than server.max_queued_tokens = 262144") as caught:
        hosts.admission.admit(hosts.loads[0], "caller", 262145, 60.0, 0.0)
    assert caught.value.retry_after_s is None


def test_a_refusal_says_when_it_is_worth_trying_again() -> None:
    hosts = FakeHosts(token_s=1e-3, max_batch_tokens=200)
    hosts.flood("caller", 20, 100, 1.0, until=4)
    hosts.run(4)
    with pytest.raises(Overloaded, match="due in 1000 ms, and what is ahead of it takes about") as caught:
        hosts.admission.admit(hosts.loads[0], "caller", 100, hosts.now + 1, hosts.now)
    assert caught.value.retry_after_s is not None
    assert isinstance(hosts.admission.refusal("caller", hosts.now + 0.5, hosts.now), Overloaded)
    assert hosts.admission.refusal("caller", hosts.now + 60, hosts.now) is None
    hosts.run(hosts.now + caught.value.retry_after_s)
    hosts.admission.admit(hosts.loads[0], "caller", 100, hosts.now + 1, hosts.now)


def test_one_stalled_batch_does_not_make_a_service_refuse_its_callers() -> None:
    """A lost host costs a second and a half once; what batches cost without that is still known."""
    cost = BatchCost()
    for _ in range(100):
        cost.learn(64, 0.004)
    cost.learn(64, 1.5)
    assert cost(64) < 0.005
    for _ in range(100):
        cost.learn(64, 1.5)
    assert cost(64) > 1.2, "what lasts is believed"


def test_a_first_batch_that_takes_long_does_not_make_a_service_refuse_its_callers() -> None:
    hosts = FakeHosts(fixed_s=2.0)
    hosts.submit("caller", 64)
    hosts.run(10)
    hosts.fixed_s = 4e-3
    for _ in range(20):
        hosts.submit("caller", 64)
        hosts.run(hosts.now + 1)
    for _ in range(4):
        hosts.submit("caller", 64, deadline_s=1.0)
    hosts.run(hosts.now + 10)
    assert hosts.ended("answered") == 25


async def test_what_fails_says_nothing_of_what_batches_cost() -> None:
    """As where a host is lost whose experts have no copy: errors come sooner than answers."""

    async def run(batch: Batch) -> None:
        batch.fail(ExpertUnavailable("experts 2 of layer layers.0 were lost with host-1"))

    batches = Batcher(run, BatchingConfig(), Admission(100, lambda tokens: None))
    with pytest.raises(ExpertUnavailable):
        await batches.submit(LayerRequest(torch.zeros(1, 4)), 1e9)
    await until_async(lambda: batches._load.queue.tokens == 0 and not batches._running)
    assert batches._load.cost.usual_s == float("inf")


@given(st.floats(0, 0.1), st.floats(1e-7, 1e-3), st.lists(st.integers(1, 65536), min_size=40, max_size=80, unique=True))
def test_the_cost_of_batches_is_learned(fixed_s: float, token_s: float, sizes: list[int]) -> None:
    cost = BatchCost()
    for tokens in sizes:
        cost.learn(tokens, fixed_s + token_s * tokens)
    for tokens in sizes[-5:]:
        assert cost(tokens) == pytest.approx(fixed_s + token_s * tokens, rel=0.5, abs=0.3 * (fixed_s + token_s * 65536))
    assert cost.fixed_s >= 0 and cost.token_s >= 0


REQUESTS = st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 300), st.floats(0.001, 2), st.integers(0, 1), st.integers(0, 2)))


@settings(max_examples=50, deadline=None)
@given(REQUESTS, st.sampled_from([0.0, 1e-4, 1e-3]))
def test_every_request_ends_once_and_nothing_is_left(requests: list[tuple[str, int, float, int, int]], pause_s: float) -> None:
    hosts = FakeHosts(layers=2, max_batch_tokens=256)
    for number, (caller, tokens, deadline_s, layer, key) in enumerate(requests):
        hosts.at(number * pause_s, lambda one=(caller, tokens, deadline_s, layer, key): hosts.submit(*one))  # type: ignore[misc]
    hosts.run(1e6)
    assert sum(hosts.ends.values()) == len(requests)
    assert hosts.admission.tokens == 0 and hosts.backlog.is_idle
    for batch in hosts.batches:
        assert len({turn.request.join_key for turn in batch}) == 1
        assert len(batch) == 1 or sum(turn.tokens for turn in batch) <= 256


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 50), st.floats(0, 9)), min_size=1), st.data())
def test_a_request_that_leaves_the_queue_is_not_run(requests: list[tuple[str, int, float]], data: st.DataObject) -> None:
    admission = Admission(10**6, lambda tokens: None)
    load = admission.backlog.add_layer(10**6, lambda: None, lambda request, error: None)
    queued = [FakeRequest(admission.admit(load, key, tokens, 100 + due, 0), tokens, 100 + due, 0) for key, tokens, due in requests]
    for request in queued:
        load.queue.add(request, 0.0)
    left = data.draw(st.sets(st.sampled_from(range(len(queued)))))
    for index in left:
        load.queue.remove(queued[index])
        load.queue.remove(queued[index])
    taken, late = admission.backlog.next_batch(load, 0)
    assert not late
    first = {turn.request.caller for turn in taken}
    assert {id(turn.request) for turn in taken} <= {id(queued[index]) for index in range(len(queued)) if index not in left}
    assert bool(taken) == (len(left) < len(queued))
    for caller in first:
        ran = [turn.request.deadline for turn in taken if turn.request.caller is caller]
        assert ran == sorted(ran)
