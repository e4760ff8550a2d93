"""A host that is stopped is found, one that computes for long is not: real processes, on every channel that leads to one."""

from __future__ import annotations

import asyncio
import gc
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, closing, contextmanager
from pathlib import Path

import pytest

from moeserve.transport import Channel, ChannelClosed, FrontendKeys, HostSilent, KeyPair, Limits, connect, listen
from tests.support.closeness import assert_close
from tests.support.descriptors import open_files
from tests.support.waiting import until_async

from .host_process import PASS_S, Order
from .rig import PATIENCE_S, Rig, random_message, send

#: longer than a busy machine stops a process for; a stopped frontend knows that it was
SILENT_AFTER_S = 1.5
REPOSITORY = Path(__file__).parents[2]
FRONTEND, HOST = KeyPair.generate(), KeyPair.generate()


class Child:
    """A process under the test's hand, and what it has said."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.said: Counter[str] = Counter()
        self.first_line = process.stdout.readline().strip() if process.stdout else ""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def stop(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def end(self) -> None:
        self.process.kill()
        self._reader.join()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said[line.strip()] += 1


@contextmanager
def child(module: str, *argv: str, told: str = "") -> Iterator[Child]:
    command, pipe = [sys.executable, "-m", f"tests.transport.{module}", *argv], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=REPOSITORY) as process:
        assert process.stdin is not None
        print(told, file=process.stdin, flush=True)
        running = Child(process)
        try:
            yield running
        finally:
            running.end()


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Child]:
    folder = tmp_path_factory.mktemp("host")
    folder.chmod(0o700)
    keys = f"{HOST.secret} {HOST.public} {FRONTEND.public}"
    with child("host_process", f"unix:{folder}/host.sock", "tcp://127.0.0.1:0", told=keys) as running:
        yield running


@asynccontextmanager
async def channels_to(host: Child, silent_after_s: float = SILENT_AFTER_S) -> AsyncIterator[list[Channel]]:
    """Over shared memory, TCP, and TCP with keys."""
    keys = [None, None, FrontendKeys(FRONTEND, HOST.public)]
    async with AsyncExitStack() as stack:
        channels = []
        for endpoint, of in zip(host.first_line.split(), keys, strict=True):
            channels.append(await connect(endpoint, keys=of, timeout_s=PATIENCE_S, silent_after_s=silent_after_s))
            stack.push_async_callback(channels[-1].close)
        yield channels


async def assert_answers(channel: Channel, order: Order = Order.ANSWER) -> None:
    answered = await asyncio.wait_for(send(channel, random_message(), layer=order), PATIENCE_S)
    assert_close(answered.tensor, random_message().expected())


async def held_by(host: Child) -> list[float]:
    """Descriptors and threads of the host."""
    async with channels_to(host) as channels:
        answered = await send(channels[0], random_message(rows=1, hidden_size=2, pairs=1), layer=Order.COUNT)
        return list(answered.tensor[0].tolist())


async def test_a_host_that_is_held_is_silent_although_it_owes_what_it_has_read(tmp_path: Path) -> None:
    resumed = threading.Event()
    with closing(listen(f"local:{tmp_path}")) as host:
        connecting = asyncio.create_task(connect(host.endpoints[0], timeout_s=PATIENCE_S, silent_after_s=SILENT_AFTER_S))
        await until_async(lambda: [connecting.done(), host.poll(0)][0])
        channel = await connecting
        answered = send(channel, random_message())
        await until_async(lambda: bool(host.poll(0)))
        host.hold(resumed)
        held = asyncio.create_task(asyncio.to_thread(host.poll, 0))
        try:
            with pytest.raises(HostSilent):
                await asyncio.wait_for(answered, PATIENCE_S)
            assert not held.done()
        finally:
            resumed.set()
        assert await held == []
        await channel.close()


@pytest.mark.parametrize("order", [Order.PYTHON, Order.TORCH, Order.KERNEL], ids=lambda order: order.name)
async def test_a_long_pass_is_not_silence_also_for_work_that_was_not_read_yet(host: Child, order: Order) -> None:
    assert PASS_S > SILENT_AFTER_S
    async with channels_to(host) as channels:
        begun = host.said[f"got {order.name}"]
        first = asyncio.create_task(assert_answers(channels[1], order))
        await until_async(lambda: host.said[f"got {order.name}"] > begun)
        await asyncio.gather(first, *(assert_answers(channel) for channel in channels))


async def stop_while_it_owes(host: Child) -> None:
    """As a fleet sees it; at the end the host has gone on and found out that nobody waits."""
    async with channels_to(host) as channels:
        for channel in channels:
            await assert_answers(channel)
        host.stop()
        await asyncio.sleep(1.5 * SILENT_AFTER_S)  # it owes nothing: nothing may happen, however long that is so
        assert not any(channel.closed.is_set() for channel in channels)
        host.resume()
        kept, cancelled = host.said["got KEEP"], host.said["cancelled"]
        futures = [send(channel, random_message(), layer=Order.KEEP) for channel in channels]
        await until_async(lambda: host.said["got KEEP"] == kept + len(channels))
        await asyncio.sleep(1.5 * SILENT_AFTER_S)  # it waits, as for other hosts, and sends heartbeats
        assert not any(future.done() for future in futures)
        host.stop()
        for channel, future in zip(channels, futures, strict=True):
            with pytest.raises(HostSilent, match=rf"{channel.endpoint} owes answers and .* for \d+\.\d\d s"):
                await asyncio.wait_for(future, PATIENCE_S)
            assert channel.closed.is_set() and channel.is_silent
            with pytest.raises(HostSilent, match=channel.endpoint):
                await send(channel, random_message())
        host.resume()
        await until_async(lambda: host.said["cancelled"] == cancelled + len(channels))


async def answer_late(host: Child) -> None:
    """What was kept is answered, though nobody waits; new channels are served."""
    async with channels_to(host) as channels:
        await assert_answers(channels[0], Order.ANSWER_ALL)
        for channel in channels:
            await assert_answers(channel)


async def test_a_stopped_host_is_found_while_it_owes_something_and_does_no_harm_when_it_goes_on(host: Child) -> None:
    await answer_late(host)
    ours, theirs = open_files(), await held_by(host)
    await stop_while_it_owes(host)
    await answer_late(host)
    gc.collect()  # an error that was caught holds the frames that it came through, and these it
    await until_async(lambda: open_files() <= ours)
    async with asyncio.timeout(PATIENCE_S):
        while any(now > before for now, before in zip(await held_by(host), theirs, strict=True)):
            pass


async def test_a_frontend_that_was_stopped_itself_does_not_blame_the_host(host: Child) -> None:
    """Both are stopped, as when a machine is frozen, and the frontend goes on first. Then it is killed: its work is cancelled at once."""
    endpoints = host.first_line.split()[:2]
    kept, cancelled = host.said["got KEEP"], host.said["cancelled"]
    with child("frontend_process", str(SILENT_AFTER_S), *endpoints) as frontend:
        assert frontend.first_line == "sent"
        await until_async(lambda: host.said["got KEEP"] == kept + len(endpoints))
        frontend.stop()
        host.stop()
        await asyncio.sleep(1.5 * SILENT_AFTER_S)
        turns = frontend.said["turn"]
        frontend.resume()
        await until_async(lambda: frontend.said["turn"] > turns + 3)
        host.resume()
        async with channels_to(host) as channels:
            await assert_answers(channels[0], Order.ANSWER_ALL)
        await until_async(lambda: frontend.said["answered answered"] == 1)
        await until_async(lambda: host.said["got KEEP"] == kept + 2 * len(endpoints))
        frontend.end()
        await until_async(lambda: host.said["cancelled"] == cancelled + len(endpoints))


async def test_a_host_that_ends_is_gone_and_not_silent(rig: Rig) -> None:
    async with rig.frontend() as channel:
        future = send(channel, random_message())
        await rig.receive(1)
        rig.listener.close()
        with pytest.raises(ChannelClosed) as caught:
            await future
        assert type(caught.value) is ChannelClosed and not channel.is_silent


async def test_the_thread_that_says_that_a_host_lives_ends_with_its_listener(tmp_path: Path) -> None:
    before = set(threading.enumerate())

    def names() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name == "heartbeat" and thread not in before]

    with closing(listen(f"unix:{tmp_path}/host.sock")) as listener:
        rig = Rig(listener, Limits(), None)
        async with rig.frontend() as channel:
            await rig.forward(channel, random_message())
            assert names() == ["heartbeat"]
    assert names() == []
