"""What every channel does, whatever carries the bytes."""

from __future__ import annotations

import asyncio
import time

import pytest
import torch

from moeserve.errors import Cancelled, DeadlineExceeded, InvalidRequest
from moeserve.transport import ChannelClosed, Destination, PassOn, PeerLost, WorkShape
from tests.support.closeness import assert_close
from tests.support.waiting import until_async

from .rig import Rig, answer, random_message, send


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "hidden_size", "pairs"), [(1, 1, 1), (3, 7, 5), (64, 256, 128)])
async def test_the_host_reads_what_was_sent_and_its_answer_comes_back(
    rig: Rig, dtype: torch.dtype, rows: int, hidden_size: int, pairs: int
) -> None:
    message = random_message(rows, hidden_size, pairs, dtype)
    async with rig.frontend() as channel:
        partial = await rig.forward(channel, message)
        assert partial.tensor.dtype == torch.float32
        assert_close(partial.tensor, message.expected())


async def test_every_field_arrives(rig: Rig) -> None:
    message = random_message(dtype=torch.bfloat16)
    async with rig.frontend() as channel:
        before = time.monotonic()
        future = send(channel, message, layer=2**32 - 1, epoch=2**64 - 1, timeout_s=40)
        (work,) = await rig.receive(1)
        assert (work.layer, work.epoch) == (2**32 - 1, 2**64 - 1)
        assert before + 39 < work.deadline <= time.monotonic() + 40
        for name in ("hidden_states", "row_index", "local_experts", "weights"):
            assert torch.equal(getattr(work, name), getattr(message, name))
        assert work.reply_buffer().shape == message.hidden_states.shape
        answer(work)
        await until_async(future.done)


@pytest.mark.parametrize("timeout_s", [2**64 / 1e6, 1e300, float("inf")])
async def test_a_deadline_beyond_all_clocks_is_none(rig: Rig, timeout_s: float) -> None:
    message = random_message()
    async with rig.frontend() as channel:
        future = send(channel, message, timeout_s=timeout_s)
        (work,) = await rig.receive(1)
        assert work.deadline > time.monotonic() + 1e8
        answer(work)
        assert_close((await future).tensor, message.expected())


async def test_a_message_to_several_hosts_shows_the_receiver_its_own_share_first(rig: Rig) -> None:
    message = random_message(rows=4, pairs=6)
    local_experts = torch.tensor([1, 3, 0, 0, 2, 1], dtype=torch.int32)
    destinations = (Destination(5, 2), Destination(9, 5), Destination(2, 6))
    async with rig.frontend() as channel:
        lease = message.fill(channel.lease(message.shape._replace(destinations=3)))
        lease.views.local_experts.copy_(local_experts)
        lease.address(destinations)
        future = channel.send(lease, layer=1, epoch=2, timeout_s=60, pass_on=PassOn.CHAIN)
        (work,) = await rig.receive(1)
        assert work.destinations == destinations and work.header.pass_on is PassOn.CHAIN
        assert work.local_experts.tolist() == [1, 3] and torch.equal(work.request.local_experts, local_experts)
        assert torch.equal(work.row_index, message.row_index[:2]) and torch.equal(work.request.row_index, message.row_index)
        assert torch.equal(work.weights, message.weights[:2]) and torch.equal(work.request.weights, message.weights)
        cancelled: list[str] = []
        work.on_cancel = lambda: cancelled.append("told")
        future.cancel()
        await rig.serve_until(lambda: cancelled == ["told"])
        work.fail(PeerLost("host 9 is gone"))
        again = send(channel, message)
        (work,) = await rig.receive(1)
        work.fail(PeerLost("host 9 is gone"))
        with pytest.raises(PeerLost, match="host 9 is gone"):
            await again


async def test_answers_find_their_question_in_any_order(rig: Rig) -> None:
    messages = [random_message(rows=1 + seed % 7, seed=seed) for seed in range(60)]
    async with rig.frontend() as channel:
        futures = [send(channel, message) for message in messages]
        for work in reversed(await rig.receive(len(messages))):
            answer(work)
        for message, future in zip(messages, futures, strict=True):
            assert_close((await future).tensor, message.expected())


async def test_more_messages_than_any_socket_buffer_holds(rig: Rig) -> None:
    message = random_message()
    async with rig.frontend() as channel:
        futures = [send(channel, message) for _ in range(1000)]
        works = await rig.receive(len(futures))
        for work in works:
            answer(work)  # the loop is not running: nobody takes the answers out
        await rig.serve_until(lambda: all(future.done() for future in futures))
        assert all(future.exception() is None for future in futures)


async def test_several_frontends_share_a_host(rig: Rig) -> None:
    messages = [random_message(seed=seed) for seed in range(3)]
    async with rig.frontend() as first, rig.frontend() as second:
        async with rig.frontend() as third:
            futures = [send(channel, message) for channel, message in zip((first, second, third), messages, strict=True)]
            for work in reversed(await rig.receive(3)):
                answer(work)
            for message, future in zip(messages, futures, strict=True):
                assert_close((await future).tensor, message.expected())
        assert_close((await rig.forward(first, messages[1])).tensor, messages[1].expected())
        assert_close((await rig.forward(second, messages[2])).tensor, messages[2].expected())


async def test_the_error_of_the_host_is_raised_here(rig: Rig) -> None:
    async with rig.frontend() as channel:
        future = send(channel, random_message())
        (work,) = await rig.receive(1)
        work.fail(InvalidRequest("slot 7 does not exist – há 4"))
        with pytest.raises(InvalidRequest, match=r"^slot 7 does not exist – há 4$"):
            await future
        await rig.forward(channel, random_message())


async def test_expired_work_never_reaches_the_host(rig: Rig) -> None:
    async with rig.frontend() as channel:
        late = send(channel, random_message(), timeout_s=0)
        send(channel, random_message(), layer=5)
        (work,) = await rig.receive(1)
        assert work.layer == 5
        with pytest.raises(DeadlineExceeded):
            await late
        answer(work)


async def test_work_cancelled_on_the_way_is_dropped_or_marked(rig: Rig) -> None:
    async with rig.frontend() as channel:
        unwanted = send(channel, random_message(seed=1))
        unwanted.cancel()
        wanted = send(channel, random_message(seed=2), layer=5)
        works = await rig.poll()
        while not any(work.layer == 5 for work in works):
            works += await rig.poll()
        for work in works:
            assert work.is_cancelled == (work.layer != 5)
            answer(work)
        assert_close((await wanted).tensor, random_message(seed=2).expected())
        with pytest.raises(asyncio.CancelledError):
            await unwanted


async def test_a_late_answer_harms_nobody(rig: Rig) -> None:
    async with rig.frontend() as channel:
        future = send(channel, random_message(seed=1))
        (work,) = await rig.receive(1)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(future, 0.001)
        await rig.serve_until(lambda: work.is_cancelled)
        partial = await rig.forward(channel, random_message(seed=2))
        answer(work)
        assert_close(partial.tensor, random_message(seed=2).expected())
        assert_close((await rig.forward(channel, random_message(seed=3))).tensor, random_message(seed=3).expected())


async def test_a_host_may_say_that_cancelled_work_was_cancelled(rig: Rig) -> None:
    async with rig.frontend() as channel:
        future = send(channel, random_message())
        (work,) = await rig.receive(1)
        future.cancel()
        await rig.serve_until(lambda: work.is_cancelled)
        work.fail(Cancelled("stopped half-way"))
        await rig.forward(channel, random_message())


async def test_when_the_host_closes_waiting_futures_fail_at_once(rig: Rig) -> None:
    async with rig.frontend() as channel:
        future = send(channel, random_message())
        await rig.receive(1)
        rig.listener.close()
        with pytest.raises(ChannelClosed, match=rig.endpoint):
            await future
        assert channel.closed.is_set()
        with pytest.raises(ChannelClosed, match=rig.endpoint):
            await send(channel, random_message())


async def test_when_the_frontend_closes_its_work_is_cancelled(rig: Rig) -> None:
    async with rig.frontend() as channel:
        future = send(channel, random_message())
        (work,) = await rig.receive(1)
        await channel.close()
        with pytest.raises(ChannelClosed, match="was closed"):
            await future
        await rig.serve_until(lambda: work.is_cancelled)
        answer(work)
        async with rig.frontend() as another:
            await rig.forward(another, random_message())


async def test_nothing_is_sent_to_a_host_without_rows(rig: Rig) -> None:
    async with rig.frontend() as channel:
        for rows, pairs in ((0, 1), (1, 0)):
            with pytest.raises(AssertionError):
                channel.lease(WorkShape(rows, 8, pairs, torch.float32))


async def test_wake_ends_a_wait(rig: Rig) -> None:
    waiting = asyncio.create_task(asyncio.to_thread(rig.listener.poll, 3600))
    rig.listener.wake()
    assert await waiting == []
