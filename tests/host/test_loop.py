"""The host's loop over a real channel: merging, refusing, surviving."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import torch

from moeserve.errors import DeadlineExceeded, ExpertUnavailable, InvalidRequest, MoEServeError
from moeserve.experts import ExpertBank, FeedForward
from moeserve.host import HostLoop
from moeserve.transport import Channel, Partial, WorkShape, connect, listen
from tests.support.closeness import assert_close
from tests.support.stacked import Stacked, bank_table_of
from tests.support.waiting import until_async

HIDDEN, HELD = 8, 3


def experts() -> list[FeedForward]:
    generator = torch.Generator().manual_seed(0)
    return Stacked(torch.randn(HELD, 8, HIDDEN, generator=generator), torch.randn(HELD, HIDDEN, 4, generator=generator)).experts("swiglu")


class CountingBank(ExpertBank):
    """Counts passes; holds the first one until told to go on, so that work piles up behind it; fails on request."""

    def __init__(self) -> None:
        super().__init__(experts(), HIDDEN, torch.float32)
        self.passes: list[int] = []
        self.go = threading.Event()
        self.error: Exception | None = None

    def run(self, hidden_states, row_index, local_experts, weights, out) -> None:
        self.passes.append(len(hidden_states))
        assert self.go.wait(30)
        if self.error is not None:
            raise self.error
        super().run(hidden_states, row_index, local_experts, weights, out)


@pytest.fixture
def bank() -> CountingBank:
    return CountingBank()


@pytest.fixture
def endpoint(bank: CountingBank, tmp_path: Path) -> Iterator[str]:
    listener = listen(f"unix:{tmp_path}/host.sock")
    loop = HostLoop(bank_table_of({5: bank}), listener)
    thread = threading.Thread(target=loop.run)
    thread.start()
    yield listener.endpoints[0]
    bank.go.set()
    loop.stop()
    thread.join()


def send(
    channel: Channel, rows: int, local_experts: list[int], layer: int = 5, width: int = HIDDEN, timeout_s: float = 30
) -> asyncio.Future[Partial]:
    lease = channel.lease(WorkShape(rows, width, len(local_experts), torch.float32))
    lease.views.hidden_states.copy_(torch.arange(rows * width).view(rows, width) / 10)
    lease.views.row_index.copy_(torch.arange(len(local_experts)) % rows)
    lease.views.local_experts.copy_(torch.tensor(local_experts))
    lease.views.weights.fill_(0.5)
    return channel.send(lease, layer=layer, epoch=1, timeout_s=timeout_s)


def expected(rows: int, local_experts: list[int]) -> torch.Tensor:
    hidden_states = torch.arange(rows * HIDDEN).view(rows, HIDDEN) / 10
    out = torch.empty(rows, HIDDEN)
    pair_weights = torch.full((len(local_experts),), 0.5)
    ExpertBank(experts(), HIDDEN, torch.float32).run(
        hidden_states, torch.arange(len(local_experts)) % rows, torch.tensor(local_experts), pair_weights, out
    )
    return out


async def test_what_waits_from_all_frontends_is_computed_in_one_pass(bank: CountingBank, endpoint: str) -> None:
    one, two = await connect(endpoint), await connect(endpoint)
    first = send(one, 2, [0, 1])
    await until_async(lambda: bank.passes)
    later = [send(one, 1, [2]), send(two, 3, [0, 0, 1, 2]), send(two, 2, [1, 1])]
    # The host reads its sockets when the pass is over, so the three have arrived by then.
    await asyncio.sleep(0)
    bank.go.set()
    assert_close((await first).tensor, expected(2, [0, 1]))
    for future, case in zip(later, ((1, [2]), (3, [0, 0, 1, 2]), (2, [1, 1])), strict=True):
        assert_close((await future).tensor, expected(*case))
    assert bank.passes == [2, 6]
    await one.close()
    await two.close()


async def test_the_time_in_passes_is_known_while_one_runs_and_after_it(bank: CountingBank, tmp_path: Path) -> None:
    listener = listen(f"unix:{tmp_path}/busy.sock")
    loop = HostLoop(bank_table_of({5: bank}), listener)
    thread = threading.Thread(target=loop.run)
    thread.start()
    channel = await connect(listener.endpoints[0])
    assert loop.clock.read().busy_s == 0
    answer = send(channel, 2, [0, 1])
    began = await until_async(lambda: bank.passes and loop.clock.read())
    running = await until_async(lambda: (now := loop.clock.read()).busy_s > began.busy_s and now)
    assert running.since_s == began.since_s < began.now_s < running.now_s
    assert running.busy_s - began.busy_s == pytest.approx(running.now_s - began.now_s)
    bank.go.set()
    await answer
    idle = await until_async(lambda: (now := loop.clock.read()).busy_s == loop.clock.read().busy_s and now)
    assert running.busy_s < idle.busy_s < idle.now_s - idle.since_s
    await channel.close()
    loop.stop()
    thread.join()


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"local_experts": [0, 3]}, InvalidRequest, "names local expert 3 of layer 5; this host has 0..2"),
        ({"local_experts": [0], "layer": 4}, ExpertUnavailable, "holds no experts of layer 4"),
        ({"local_experts": [0], "width": 6}, InvalidRequest, "rows of layer 5 are 8 wide, got 6"),
    ],
)
async def test_work_that_does_not_fit_is_refused_and_harms_no_other(
    bank: CountingBank, endpoint: str, arguments, error, sentence: str
) -> None:
    channel = await connect(endpoint)
    bank.go.set()
    bad, good = send(channel, 2, **arguments), send(channel, 2, [0, 2])
    with pytest.raises(error, match=sentence):
        await bad
    assert_close((await good).tensor, expected(2, [0, 2]))
    await channel.close()


async def test_a_failing_pass_is_told_to_the_callers_and_the_host_lives_on(
    bank: CountingBank, endpoint: str, caplog: pytest.LogCaptureFixture
) -> None:
    channel = await connect(endpoint)
    bank.error = ZeroDivisionError()
    bank.go.set()
    failing = [send(channel, 2, [0]) for _ in range(3)]
    for answer in await asyncio.gather(*failing, return_exceptions=True):
        assert isinstance(answer, MoEServeError) and "failed to compute layer 5: ZeroDivisionError" in str(answer)
    bank.error = None
    assert_close((await send(channel, 1, [1])).tensor, expected(1, [1]))
    await channel.close()


@pytest.fixture
def banks(tmp_path: Path) -> Iterator[tuple[dict[int, CountingBank], str]]:
    """Of layers 5 to 7, and where their host listens."""
    banks = {layer: CountingBank() for layer in (5, 6, 7)}
    listener = listen(f"unix:{tmp_path}/three.sock")
    loop = HostLoop(bank_table_of(dict(banks)), listener)
    thread = threading.Thread(target=loop.run)
    thread.start()
    yield banks, listener.endpoints[0]
    for bank in banks.values():
        bank.go.set()
    loop.stop()
    thread.join()


async def test_what_was_given_up_while_another_pass_ran_is_never_computed(banks: tuple[dict[int, CountingBank], str]) -> None:
    of, endpoint = banks
    channel = await connect(endpoint)
    first = send(channel, 1, [0], layer=5)
    await until_async(lambda: of[5].passes)
    second, given_up, late = send(channel, 1, [0], layer=6), send(channel, 1, [0], layer=7), send(channel, 1, [0], layer=7, timeout_s=0.05)
    of[5].go.set()
    await until_async(lambda: of[6].passes)  # so all three have arrived
    given_up.cancel()
    await asyncio.sleep(0.05)  # the deadline of the third
    of[6].go.set()
    of[7].go.set()
    await asyncio.gather(first, second)
    with pytest.raises(DeadlineExceeded):
        await late
    assert (await send(channel, 3, [1, 2], layer=7)).tensor.shape == (3, HIDDEN)
    assert of[7].passes == [3]
    await channel.close()


class ReadingBank(CountingBank):
    """Experts 0 and 1 are in memory; a pass with expert 2 waits until it has been read. `during` each other pass more may come."""

    def __init__(self) -> None:
        super().__init__()
        self.go.set()
        self.began, self.read = threading.Event(), threading.Event()
        self.during: Callable[[int], None] = lambda count: None

    def claim(self, local_experts: torch.Tensor) -> bool:
        return int(local_experts[-1]) < 2

    def run(self, hidden_states, row_index, local_experts, weights, out) -> None:
        if int(local_experts[-1]) == 2:
            self.began.set()
            assert self.read.wait(30)
            out.zero_()
            return
        super().run(hidden_states, row_index, local_experts, weights, out)
        self.during(len(self.passes))


class Reading:
    """A host with experts of layers 5 and 6, and a caller who may ask from any thread."""

    def __init__(self, channel: Channel, first: ReadingBank, other: ReadingBank) -> None:
        self.first, self.other, self.answers = first, other, list[asyncio.Future[Partial]]()
        self._channel, self._loop = channel, asyncio.get_running_loop()

    def ask(self, layer: int, expert: int) -> None:
        asyncio.run_coroutine_threadsafe(self._ask(layer, expert), self._loop).result(10)

    async def served(self) -> None:
        await self._ask(5, 0)
        await until_async(lambda: all(answer.done() for answer in self.answers))
        for answer in self.answers:
            answer.result()

    async def _ask(self, layer: int, expert: int) -> None:
        self.answers.append(send(self._channel, 1, [expert], layer))


@pytest.fixture
async def reading(tmp_path: Path) -> AsyncIterator[Reading]:
    first, other, listener = ReadingBank(), ReadingBank(), listen(f"unix:{tmp_path}/reading.sock")
    loop = HostLoop(bank_table_of({5: first, 6: other}), listener)
    thread = threading.Thread(target=loop.run)
    thread.start()
    channel = await connect(listener.endpoints[0])
    yield Reading(channel, first, other)
    first.read.set()
    await channel.close()
    loop.stop()
    await asyncio.to_thread(thread.join)


async def test_what_must_be_read_begins_although_more_always_comes_for_experts_in_memory(reading: Reading) -> None:
    def during(count: int) -> None:
        if count == 1:
            reading.ask(5, 2)
        if count < 5:
            reading.ask(5, 0)
        else:
            assert reading.first.began.wait(10)
            reading.first.read.set()

    reading.first.during = during
    await reading.served()
    assert len(reading.first.passes) == 5


async def test_while_an_expert_is_read_all_layers_have_their_turns(reading: Reading) -> None:
    def during(count: int) -> None:
        if count < 3:
            reading.ask(5, 2)
        if count == 3:
            assert reading.first.began.wait(10)
            reading.ask(6, 0)
        if count < 6:
            reading.ask(5, 0)
        else:
            assert reading.other.passes == [1]
            reading.first.read.set()

    reading.first.during = during
    await reading.served()
