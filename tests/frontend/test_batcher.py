"""Admission and joining, with a run function the test holds in its hand."""

from __future__ import annotations

import asyncio
import weakref
from dataclasses import replace

import pytest
import torch

from moeserve.api.request import LayerRequest
from moeserve.config import BatchingConfig, GatingOverrides
from moeserve.errors import InvalidRequest, MoEServeError, Overloaded
from moeserve.frontend.admission import Admission
from moeserve.frontend.batch import Batch
from moeserve.frontend.batcher import Batcher

FAR = 1e9


class Runs:
    """Records batches; each ends when `release` is called."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self.gates: list[asyncio.Event] = []

    async def __call__(self, batch: Batch) -> None:
        self.batches.append(batch)
        self.gates.append(asyncio.Event())
        await self.gates[-1].wait()
        for member in batch.members:
            if not member.answer.done():
                member.answer.set_result(member.request.num_tokens)  # type: ignore[arg-type]

    @property
    def sizes(self) -> list[list[int]]:
        return [batch.sizes for batch in self.batches]


def request(tokens: int, top_k: int = 0) -> LayerRequest:
    ids = torch.zeros(tokens, top_k, dtype=torch.int64) if top_k else None
    return LayerRequest(torch.zeros(tokens, 4), topk_ids=ids, topk_weights=None if ids is None else ids.float())


def batcher(runs: Runs, max_tokens: int = 1000, **config: float) -> tuple[Batcher, Admission]:
    admission = Admission(max_tokens, lambda tokens: None)
    return Batcher(runs, BatchingConfig.model_validate(config), admission), admission


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_lone_request_runs_at_once() -> None:
    runs = Runs()
    batches, _ = batcher(runs, max_batch_wait_ms=60_000.0)
    answer = batches.submit(request(3), FAR)
    await settle()
    assert runs.sizes == [[3]]
    runs.gates[0].set()
    assert await answer == 3


async def test_what_waits_is_joined_up_to_the_limit_in_order() -> None:
    runs = Runs()
    batches, _ = batcher(runs, max_batch_tokens=10)
    answers = [batches.submit(request(tokens), FAR) for tokens in (1, 1, 4, 5, 1, 3, 20)]
    await settle()
    assert runs.sizes == [[1], [1]]
    runs.gates[0].set()
    runs.gates[1].set()
    await settle()
    assert runs.sizes[2:] == [[4, 5, 1], [3]]
    runs.gates[2].set()
    await settle()
    assert runs.sizes[4:] == [[20]], "a request larger than a batch runs alone"
    for gate in runs.gates:
        gate.set()
    assert await asyncio.gather(*answers) == [1, 1, 4, 5, 1, 3, 20]


async def test_only_requests_routed_the_same_way_are_joined() -> None:
    runs = Runs()
    batches, _ = batcher(runs)
    for top_k in (0, 0, 2, 2, 3, 0, 0):
        batches.submit(request(1, top_k), FAR)
    for index in range(6):
        await settle()
        if index < len(runs.gates):
            runs.gates[index].set()
    assert runs.sizes == [[1], [1], [1, 1], [1], [1, 1]]


async def test_only_requests_under_one_gating_are_joined() -> None:
    runs = Runs()
    batches, _ = batcher(runs)
    first = LayerRequest(torch.zeros(1, 4))
    for changes in ({}, {}, {}, {"capacity_factor": 1.0}, {"capacity_factor": 1.0}, {"noise": "normal"}, {"noise": "normal", "seed": 1}):
        batches.submit(replace(first, **changes), FAR)
    for index in range(6):
        await settle()
        if index < len(runs.gates):
            runs.gates[index].set()
    assert runs.sizes == [[1], [1], [1], [1, 1], [1], [1]]
    assert [batch.overrides for batch in runs.batches[2:4]] == [GatingOverrides(), GatingOverrides(capacity_factor=1.0)]


async def test_while_hosts_are_busy_a_batch_may_wait_for_company() -> None:
    runs = Runs()
    batches, _ = batcher(runs, max_batch_tokens=8, max_batch_wait_ms=60_000.0)
    batches.submit(request(1), FAR)
    batches.submit(request(3), FAR)
    await settle()
    assert runs.sizes == [[1]]
    batches.submit(request(5), FAR)
    await settle()
    assert runs.sizes == [[1], [3, 5]], "full: no reason to wait"
    batches.submit(request(2), FAR)
    runs.gates[1].set()
    await settle()
    assert len(runs.batches) == 2
    runs.gates[0].set()
    await settle()
    assert runs.sizes[2:] == [[2]], "the hosts are idle: never wait"
    runs.gates[2].set()
    await settle()


async def test_the_token_budget_refuses_at_once_and_is_given_back() -> None:
    runs = Runs()
    batches, admission = batcher(runs, max_tokens=10)
    first = batches.submit(request(6), FAR)
    with pytest.raises(Overloaded, match=r"6 tokens are queued and 5 more exceed server.max_queued_tokens = 10"):
        batches.submit(request(5), FAR)
    second = batches.submit(request(4), FAR)
    assert admission.tokens == 10
    await settle()
    runs.gates[0].set()
    await first
    second.cancel()
    await settle()
    assert admission.tokens == 0


async def test_what_is_given_up_as_it_is_taken_holds_up_nobody() -> None:
    """Its caller leaves in the moment in which a batch ends and the next is taken, and the next cannot join it."""
    runs = Runs()
    batches, _ = batcher(runs)
    first, _ = batches.submit(request(1), FAR), batches.submit(request(1), FAR)
    given_up, waiting = batches.submit(request(2), FAR), batches.submit(request(3, top_k=1), FAR)
    first.add_done_callback(lambda _: given_up.cancel())
    await settle()
    runs.gates[0].set()
    await settle()
    assert given_up.cancelled() and runs.sizes == [[1], [1], [3]]
    runs.gates[2].set()
    await waiting


async def test_who_holds_the_most_makes_room_for_others() -> None:
    runs = Runs()
    batches, admission = batcher(runs, max_tokens=10)
    greedy = [batches.submit(request(tokens), FAR) for tokens in (4, 3, 3)]
    await settle()
    other = batches.submit(replace(request(2), caller="other"), FAR)
    with pytest.raises(Overloaded, match="10 tokens are queued, most of them of this caller, and others need the room; try again") as told:
        await greedy[2]
    assert told.value.retry_after_s is not None and admission.tokens == 9
    with pytest.raises(Overloaded, match=r"9 tokens are queued and 3 more exceed server.max_queued_tokens = 10"):
        batches.submit(request(3), FAR)
    for gate in runs.gates:
        gate.set()
    await settle()
    for gate in runs.gates:
        gate.set()
    await asyncio.gather(*greedy[:2], other)
    assert admission.tokens == 0


async def test_a_request_given_up_in_the_queue_is_never_run() -> None:
    runs = Runs()
    batches, _ = batcher(runs)
    running = [batches.submit(request(1), FAR) for _ in range(2)]
    queued = [batches.submit(request(tokens), FAR) for tokens in (2, 3)]
    queued[0].cancel()
    await settle()
    for gate in runs.gates:
        gate.set()
    await asyncio.gather(*running)
    await settle()
    assert runs.sizes[2:] == [[3]]
    runs.gates[2].set()
    await queued[1]


async def test_a_request_given_up_leaves_the_queue_at_once() -> None:
    runs = Runs()
    batches, _ = batcher(runs, max_batch_tokens=8)
    for tokens in (1, 1, 3):  # two batches under way and one request behind them
        batches.submit(request(tokens), FAR)
    rows = torch.zeros(4, 4)
    left, stays = batches.submit(LayerRequest(rows), FAR), batches.submit(request(5), FAR)
    held = weakref.ref(rows)
    del rows
    await settle()
    left.cancel()
    await settle()
    assert held() is None
    for gate in list(runs.gates):
        gate.set()
    await settle()
    assert runs.sizes == [[1], [1], [3, 5]]
    runs.gates[2].set()
    assert await stays == 5


async def test_a_request_that_had_to_wait_is_not_kept_until_its_deadline() -> None:
    runs = Runs()
    batches, _ = batcher(runs)
    rows = torch.zeros(4, 4)
    held, answer = weakref.ref(rows), batches.submit(LayerRequest(rows), FAR)
    del rows
    runs.batches[0].members[0].waits_for("host-0 did not come back before the deadline")
    runs.gates[0].set()
    assert await answer == 4
    runs.batches.clear()
    await settle()
    assert held() is None


async def test_a_batch_nobody_waits_for_is_cancelled() -> None:
    runs = Runs()
    cancelled = asyncio.Event()

    async def run(batch: Batch) -> None:
        try:
            await runs(batch)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    batches = Batcher(run, BatchingConfig(), Admission(100, lambda tokens: None))
    answer = batches.submit(request(1), FAR)
    await settle()
    answer.cancel()
    await asyncio.wait_for(cancelled.wait(), 5)


async def test_a_bad_request_fails_alone() -> None:
    async def run(batch: Batch) -> None:
        await asyncio.sleep(0)
        if 13 in batch.sizes:
            raise InvalidRequest("thirteen")
        for member in batch.members:
            member.answer.set_result(member.request.num_tokens)  # type: ignore[arg-type]

    batches = Batcher(run, BatchingConfig(), Admission(100, lambda tokens: None))
    answers = [batches.submit(request(tokens), FAR) for tokens in (1, 2, 3, 13, 4)]
    results = await asyncio.gather(*answers, return_exceptions=True)
    assert results[:3] == [1, 2, 3] and results[4] == 4
    assert isinstance(results[3], InvalidRequest)


async def test_an_unexpected_error_answers_everybody_and_the_next_batch_runs(caplog: pytest.LogCaptureFixture) -> None:
    fail = True

    async def run(batch: Batch) -> None:
        if fail:
            raise ZeroDivisionError
        batch.members[0].answer.set_result(1)  # type: ignore[arg-type]

    batches = Batcher(run, BatchingConfig(), Admission(100, lambda tokens: None))
    with pytest.raises(MoEServeError, match="failed to run the batch: ZeroDivisionError"):
        await batches.submit(request(1), FAR)
    fail = False
    assert await batches.submit(request(1), FAR) == 1


async def test_requests_that_are_held_join_one_batch() -> None:
    runs = Runs()
    batches, _ = batcher(runs)
    batches.hold()
    answers = [batches.submit(request(tokens), FAR) for tokens in (1, 2, 3)]
    await settle()
    assert runs.sizes == []
    batches.release()
    await settle()
    assert runs.sizes == [[1, 2, 3]]
    runs.gates[0].set()
    assert await asyncio.gather(*answers) == [1, 2, 3]
