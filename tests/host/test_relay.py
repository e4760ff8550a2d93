"""A host that passes rows on: whom it talks to, what it adds up, what it says when that fails."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moeserve.errors import Cancelled, DeadlineExceeded, InvalidRequest, MoEServeError, Overloaded
from moeserve.experts import ExpertBank
from moeserve.host import HostLoop, Relay
from moeserve.host.relay import Relayed
from moeserve.observe.stats import HostInfo
from moeserve.transport import Channel, Destination, KeyPair, Listener, Partial, PassOn, PeerLost, Work, WorkShape, connect, listen
from moeserve.transport.timing import SILENT_AFTER_S
from tests.support.closeness import assert_close
from tests.support.descriptors import open_files
from tests.support.stacked import Stacked, bank_table_of
from tests.support.waiting import until_async

HIDDEN, ROWS = 8, 3
#: a peer may be silent for so long: longer than a connection allows that is told nothing
HANG_AFTER_S = 30.0


def bank(number: int) -> ExpertBank:
    generator = torch.Generator().manual_seed(number)
    return ExpertBank(
        Stacked(torch.randn(2, 8, HIDDEN, generator=generator), torch.randn(2, HIDDEN, 4, generator=generator)).experts("swiglu"),
        HIDDEN,
        torch.float32,
    )


class FailingBank(ExpertBank):
    def __init__(self) -> None:
        super().__init__(bank(0).experts, HIDDEN, torch.float32)

    def run(self, *args: object, **kwargs: object) -> None:
        raise ZeroDivisionError


class Hosts:
    """Hosts 0 and 1 in threads; host 2 is a listener that moves only when the test says so."""

    def __init__(self, folder: Path) -> None:
        listeners = [listen(f"unix:{folder}/{number}.sock") for number in range(3)]
        self.infos = [HostInfo(f"host-{n}", listener.endpoints, node="node") for n, listener in enumerate(listeners)]
        self.third: Listener = listeners[2]
        self.relays = [Relay(number, KeyPair.generate(), HANG_AFTER_S) for number in range(2)]
        self.tables = [bank_table_of({0: bank(number)}) for number in range(2)]
        self._loops = [HostLoop(self.tables[n], listeners[n], self.relays[n]) for n in range(2)]
        self._threads = [threading.Thread(target=loop.run) for loop in self._loops]
        for thread in self._threads:
            thread.start()
        self.introduce()

    def introduce(self) -> None:
        for relay in self.relays:
            relay.meet(dict(enumerate(self.infos)))

    async def third_receives(self) -> Work:
        async with asyncio.timeout(10):
            while True:
                for work in await asyncio.to_thread(self.third.poll, 0.01):
                    return work

    def close(self) -> None:
        for loop, thread in zip(self._loops, self._threads, strict=True):
            loop.stop()
            thread.join()
        self.third.close()


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    running = Hosts(tmp_path)
    yield running
    running.close()


def send(
    channel: Channel, destinations: Sequence[int], pass_on: PassOn = PassOn.FAN_OUT, timeout_s: float = 30.0
) -> asyncio.Future[Partial]:
    """Rows 0..2; every destination is asked for local experts 0 and 1 of row 0 and for 1 of the row of its place."""
    shares = [(0, place) for place in range(len(destinations))]
    pairs = [(row, slot) for share in shares for row, slot in ((0, 0), (0, 1), (share[1], 1))]
    lease = channel.lease(WorkShape(ROWS, HIDDEN, len(pairs), torch.float32, len(destinations) if len(destinations) > 1 else 0))
    lease.views.hidden_states.copy_(torch.arange(ROWS * HIDDEN).view(ROWS, HIDDEN) / 10)
    lease.views.row_index.copy_(torch.tensor([row for row, _ in pairs]))
    lease.views.local_experts.copy_(torch.tensor([slot for _, slot in pairs]))
    lease.views.weights.fill_(0.5)
    if len(destinations) > 1:
        lease.address([Destination(host, 3 * (place + 1)) for place, host in enumerate(destinations)])
    return channel.send(lease, layer=0, epoch=1, timeout_s=timeout_s, pass_on=pass_on if len(destinations) > 1 else PassOn.NOTHING)


def expected(destinations: Sequence[int]) -> torch.Tensor:
    hidden_states = torch.arange(ROWS * HIDDEN).view(ROWS, HIDDEN) / 10
    total = torch.zeros(ROWS, HIDDEN)
    for place, host in enumerate(destinations):
        out = torch.empty(ROWS, HIDDEN)
        bank(host).run(hidden_states, torch.tensor([0, 0, place]), torch.tensor([0, 1, 1]), torch.full((3,), 0.5), out)
        total += out
    return total


@pytest.mark.parametrize("pass_on", [PassOn.FAN_OUT, PassOn.CHAIN])
async def test_shares_are_added_up_and_a_peer_gets_only_the_rows_it_needs(hosts: Hosts, pass_on: PassOn) -> None:
    channel = await connect(hosts.infos[0].endpoints[0])
    future = send(channel, [0, 1, 2], pass_on)
    work = await hosts.third_receives()
    assert not work.destinations and work.row_index.tolist() == [0, 0, 1] and work.local_experts.tolist() == [0, 1, 1]
    assert torch.equal(work.hidden_states, (torch.arange(ROWS * HIDDEN).view(ROWS, HIDDEN) / 10)[[0, 2]])
    assert (work.layer, work.epoch) == (0, 1)
    work.reply_buffer().fill_(100)
    work.reply()
    by_hand = torch.tensor([100.0, 0, 100])[:, None]
    assert_close((await future).tensor, expected([0, 1]) + by_hand)
    await channel.close()


async def test_a_cancelled_work_is_cancelled_at_the_peers_and_a_late_one_is_given_up(hosts: Hosts) -> None:
    channel = await connect(hosts.infos[0].endpoints[0])
    future = send(channel, [0, 2])
    work = await hosts.third_receives()
    future.cancel()
    async with asyncio.timeout(10):
        while not work.is_cancelled:
            await asyncio.to_thread(hosts.third.poll, 0.01)
    work.fail(Cancelled("stopped"))
    late = send(channel, [0, 2], timeout_s=0.2)
    with pytest.raises(DeadlineExceeded):
        await late
    assert_close((await send(channel, [0, 1])).tensor, expected([0, 1]))
    await channel.close()


async def test_nobody_is_talked_to_but_those_in_the_directory(hosts: Hosts) -> None:
    channel = await connect(hosts.infos[0].endpoints[0])
    with pytest.raises(PeerLost, match="does not know host 4000000000"):
        await send(channel, [0, 4_000_000_000])
    with pytest.raises(InvalidRequest, match="addressed to host 1"):
        await send(channel, [1, 0])
    hosts.relays[0].meet({0: hosts.infos[0]})
    with pytest.raises(PeerLost, match="does not know host 1"):
        await send(channel, [0, 1])
    hosts.introduce()
    assert_close((await send(channel, [0, 1])).tensor, expected([0, 1]))
    await channel.close()


async def test_a_peer_that_goes_is_lost_and_a_new_incarnation_is_found(hosts: Hosts, tmp_path: Path) -> None:
    channel = await connect(hosts.infos[0].endpoints[0])
    future = send(channel, [0, 2])
    await hosts.third_receives()
    hosts.third.close()
    with pytest.raises(PeerLost):
        await future
    with pytest.raises(PeerLost):
        await send(channel, [0, 2])
    hosts.third = listen(f"unix:{tmp_path}/new.sock")
    hosts.infos[2] = HostInfo("host-2", hosts.third.endpoints, node="node")
    hosts.introduce()
    again = send(channel, [0, 2])
    work = await hosts.third_receives()
    work.reply_buffer().zero_()
    work.reply()
    assert_close((await again).tensor, expected([0]))
    await channel.close()


async def test_peers_that_have_left_keep_no_memory(hosts: Hosts, tmp_path: Path) -> None:
    channel = await connect(hosts.infos[0].endpoints[0])
    hosts.third.close()
    counts = []
    for number in range(3, 7):
        hosts.third = listen(f"unix:{tmp_path}/{number}.sock")
        info = HostInfo(f"host-{number}", hosts.third.endpoints, node="node")
        hosts.relays[0].meet({0: hosts.infos[0], number: info})
        future = send(channel, [0, number])
        work = await hosts.third_receives()
        work.reply_buffer().zero_()
        work.reply()
        await future
        del future, work
        counts.append(len([name for _, name in open_files() if name.startswith("/memfd:moeserve")]))
        hosts.third.close()
    assert counts[-1] == counts[1]
    await channel.close()


@pytest.mark.parametrize("error", [None, InvalidRequest("no such slot"), Overloaded("no room")])
async def test_nothing_of_a_message_that_was_passed_on_is_left_to_the_garbage_collector(hosts: Hosts, error: MoEServeError | None) -> None:
    channel = await connect(hosts.infos[0].endpoints[0])
    gc.collect()
    gc.disable()
    try:
        future = send(channel, [0, 1, 2])
        work = await hosts.third_receives()
        work.reply_buffer().zero_()
        work.reply() if error is None else work.fail(error)
        await asyncio.wait([future])
        assert (future.exception() is None) is (error is None)
        await until_async(lambda: not any(type(each) is Relayed for each in gc.get_objects()))
    finally:
        gc.enable()
    await channel.close()


async def test_a_peer_that_says_something_new_of_itself_is_still_the_same(hosts: Hosts) -> None:
    channel = await connect(hosts.infos[0].endpoints[0])
    before = send(channel, [0, 2])
    works = [await hosts.third_receives()]
    hosts.infos[2] = replace(hosts.infos[2], weights_bytes=99)
    hosts.introduce()
    after = send(channel, [0, 2])
    works.append(await hosts.third_receives())
    for work in works:
        work.reply_buffer().zero_()
        work.reply()
    for future in (before, after):
        assert_close((await future).tensor, expected([0]))
    await channel.close()


async def test_a_peer_may_be_silent_for_as_long_as_the_service_allows(hosts: Hosts) -> None:
    channel = await connect(hosts.infos[0].endpoints[0])
    future, resumed = send(channel, [0, 2]), threading.Event()
    work = await hosts.third_receives()
    hosts.third.hold(resumed)
    held = asyncio.create_task(asyncio.to_thread(hosts.third.poll, 0))
    try:
        await asyncio.wait([future], timeout=1.5 * SILENT_AFTER_S)
        assert not future.done()
    finally:
        resumed.set()
        await held
    work.reply_buffer().zero_()
    work.reply()
    assert_close((await future).tensor, expected([0]))
    await channel.close()


async def test_what_goes_wrong_here_or_there_is_said_once_everybody_has_let_go(hosts: Hosts) -> None:
    channel = await connect(hosts.infos[0].endpoints[0])
    future = send(channel, [0, 2])
    work = await hosts.third_receives()
    work.fail(InvalidRequest("no such slot"))
    with pytest.raises(InvalidRequest, match="no such slot"):
        await future
    hosts.tables[0].put(0, 0, FailingBank())
    with pytest.raises(MoEServeError, match="failed to compute layer 0: ZeroDivisionError"):
        await send(channel, [0, 1])
    hosts.tables[0].put(0, 0, bank(0))
    assert_close((await send(channel, [0, 1])).tensor, expected([0, 1]))
    await channel.close()


async def test_a_host_without_a_relay_passes_nothing_on(tmp_path: Path) -> None:
    listener = listen(f"unix:{tmp_path}/alone.sock")
    loop = HostLoop(bank_table_of({0: bank(0)}), listener)
    thread = threading.Thread(target=loop.run)
    thread.start()
    channel = await connect(listener.endpoints[0])
    with pytest.raises(InvalidRequest, match="does not pass on"):
        await send(channel, [0, 1])
    await channel.close()
    loop.stop()
    thread.join()
