"""How channels lend and take back memory, and that nothing stays behind."""

from __future__ import annotations

import asyncio
import gc
import os
from pathlib import Path

import pytest
import torch

from moeserve.errors import InvalidRequest, Overloaded
from moeserve.transport import Channel, Lease, Limits, WorkShape
from tests.support.closeness import assert_close
from tests.support.descriptors import open_files
from tests.support.waiting import until_async

from .rig import Message, Rig, RigFactory, answer, random_message, send

PAGE = WorkShape(1, 64, 1, torch.float32)


def has_room(channel: Channel) -> bool:
    try:
        channel.lease(PAGE)
    except Overloaded:
        return False
    return True


async def test_a_message_over_the_limit_is_refused_by_name(make_rig: RigFactory) -> None:
    rig = make_rig(max_message_bytes=10_000)
    async with rig.frontend() as channel:
        channel.lease(WorkShape(10, 64, 1, torch.float32))
        with pytest.raises(InvalidRequest, match=r"max_message_bytes .* is 10000"):
            channel.lease(WorkShape(20, 64, 1, torch.float32))


async def test_the_limit_of_the_host_binds_the_frontend(make_rig: RigFactory) -> None:
    rig = make_rig(max_message_bytes=10_000)
    async with rig.frontend(Limits(2**20, 2**22)) as channel:
        with pytest.raises(InvalidRequest, match="is 10000"):
            channel.lease(WorkShape(20, 64, 1, torch.float32))


async def test_messages_in_flight_are_bounded_until_they_are_released(make_rig: RigFactory) -> None:
    rig = make_rig(max_message_bytes=4096, max_pool_bytes=2 * 4096)
    async with rig.frontend() as channel:
        futures = [send(channel, random_message()) for _ in range(2)]
        with pytest.raises(Overloaded):
            channel.lease(PAGE)
        await rig.serve_until(lambda: all(future.done() for future in futures))
        futures.clear()
        for _ in range(20):
            await rig.forward(channel, random_message())


async def test_a_cancelled_message_keeps_its_memory_until_the_host_has_answered(make_rig: RigFactory) -> None:
    rig = make_rig(max_message_bytes=4096, max_pool_bytes=4096)
    async with rig.frontend() as channel:
        future = send(channel, random_message())
        (work,) = await rig.receive(1)
        future.cancel()
        with pytest.raises(Overloaded):
            channel.lease(PAGE)
        answer(work)
        await until_async(lambda: has_room(channel))


async def test_memory_is_used_again_only_when_no_view_is_left(rig: Rig) -> None:
    async with rig.frontend() as channel:
        lease = channel.lease(PAGE)
        address = lease.views.hidden_states.data_ptr()
        view = lease.views.hidden_states[0, 3:]
        del lease
        other = channel.lease(PAGE)
        assert other.views.hidden_states.data_ptr() != address
        del view
        again = channel.lease(PAGE)
        assert again.views.hidden_states.data_ptr() == address


async def test_answers_use_warm_memory(rig: Rig) -> None:
    async with rig.frontend() as channel:
        addresses = set()
        for _ in range(5):
            message = random_message()
            lease = channel.lease(message.shape)
            addresses.add(lease.views.hidden_states.data_ptr())
            future = channel.send(message.fill(lease), layer=0, epoch=0, timeout_s=60)
            await rig.serve_until(future.done)
            del lease, future
        assert len(addresses) == 1


async def test_leases_are_filled_by_many_threads(rig: Rig) -> None:
    def fill(message: Message) -> Lease:
        return message.fill(channel.lease(message.shape))

    messages = [random_message(rows=1 + seed % 9, seed=seed) for seed in range(40)]
    async with rig.frontend() as channel:
        leases = await asyncio.gather(*(asyncio.to_thread(fill, message) for message in messages))
        futures = [channel.send(lease, layer=0, epoch=0, timeout_s=60) for lease in leases]
        await rig.serve_until(lambda: all(future.done() for future in futures))
        for message, future in zip(messages, futures, strict=True):
            assert_close(future.result().tensor, message.expected())


async def test_a_sent_lease_cannot_be_written_to(rig: Rig) -> None:
    async with rig.frontend() as channel:
        lease = random_message().fill(channel.lease(random_message().shape))
        future = channel.send(lease, layer=0, epoch=0, timeout_s=60)
        with pytest.raises(AttributeError):
            lease.views.hidden_states  # noqa: B018 - the access is the test
        await rig.serve_until(future.done)


async def test_nothing_stays_behind(make_rig: RigFactory, tmp_path: Path) -> None:
    async def live() -> None:
        rig = make_rig()
        async with rig.frontend() as first, rig.frontend() as second:
            await rig.forward(first, random_message())
            send(second, random_message(rows=64, hidden_size=1024)).cancel()
        rig.listener.close()

    await live()  # starts what libzmq keeps for the process
    gc.collect()
    before = open_files()
    for _ in range(3):
        await live()
    await until_async(lambda: open_files() <= before)
    assert os.listdir(tmp_path) == []
