"""Large tensors between a client and a service of one user on one machine: they do not pass through the connection."""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
import torch

from moeserve import Client, errors
from moeserve.client import memory as client_memory
from moeserve.memory import create_shared
from moeserve.server import memories
from moeserve.v1 import moe_service_pb2 as pb
from moeserve.v1 import moe_service_pb2_grpc as pb_grpc
from tests.client.calls import Calls
from tests.support.counting import Counting
from tests.support.descriptors import no_free_descriptors
from tests.support.engine import HIDDEN, FakeEngine, identity, spec
from tests.support.messages import request
from tests.support.ports import kept_port
from tests.support.servers import served
from tests.support.waiting import until

LARGE = torch.randn(2**14, HIDDEN)  # 1 MiB


@pytest.fixture
def counting(target: str) -> Iterator[Counting]:
    counting = Counting(int(target.rpartition(":")[2]))
    yield counting
    counting.stop()


def mapped() -> set[bytes]:
    """The inodes of the memory of clients that this process, the server's, has mapped."""
    return {line.split()[4] for line in Path("/proc/self/maps").read_bytes().splitlines() if b"memfd:moeserve" in line}


async def test_large_tensors_do_not_pass_through_the_connection(connect: Callable[..., Calls], counting: Counting) -> None:
    calls = connect(counting.target)
    for number in range(1, 4):
        answer = await calls.forward(number * LARGE, layer=1)
        assert torch.equal(answer.hidden_states, 2 * number * LARGE)
        assert answer.requested.sum() == 2 * len(LARGE)
    assert counting.nbytes < 400_000
    assert torch.equal((await calls.forward(LARGE[:3])).hidden_states, LARGE[:3])
    assert torch.equal((await calls.forward(LARGE.bfloat16()[:, :HIDDEN])).hidden_states, LARGE.bfloat16())


async def test_answers_stay_as_they_are(calls: Calls) -> None:
    """What comes later is not written over them."""
    answers = [await calls.forward(number * LARGE) for number in range(5)]
    for number, answer in enumerate(answers):
        assert torch.equal(answer.hidden_states, number * LARGE)


async def test_many_large_calls_at_a_time(calls: Calls) -> None:
    answers = await asyncio.gather(*(calls.forward(number * LARGE) for number in range(16)))
    assert all(torch.equal(answer.hidden_states, number * LARGE) for number, answer in enumerate(answers))


async def test_a_call_that_is_given_up_leaves_its_memory_alone(calls: Calls, engine: FakeEngine) -> None:
    """The service may still write the answer of the first call while the second one is made."""
    await calls.forward(LARGE)
    engine.gate.clear()
    with pytest.raises(errors.DeadlineExceeded):
        await calls.forward(LARGE, timeout=0.2)
    engine.open_gate()
    for number in range(3):
        assert torch.equal((await calls.forward(number * LARGE)).hidden_states, number * LARGE)


async def test_errors_are_those_of_other_calls(calls: Calls, engine: FakeEngine) -> None:
    await calls.forward(LARGE)
    with pytest.raises(errors.InvalidRequest, match="finite"):
        await calls.forward(LARGE / 0)
    with pytest.raises(errors.InvalidRequest, match=str(HIDDEN)):
        await calls.forward(LARGE.view(-1, 2 * HIDDEN))
    with pytest.raises(errors.InvalidRequest, match="larger than max_message_bytes"):
        await calls.forward(torch.zeros(2**17, HIDDEN))
    engine.errors = [errors.Overloaded("full", 0.01)]
    assert torch.equal((await calls.forward(LARGE)).hidden_states, LARGE)


async def test_a_service_without_it_gets_messages_and_the_log_says_so_once(
    connect: Callable[..., Calls], target: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(client_memory, "is_same_user", lambda sock: False)
    calls = connect(target)
    with caplog.at_level(logging.WARNING, "moeserve.client"):
        for number in range(3):
            assert torch.equal((await calls.forward(number * LARGE)).hidden_states, number * LARGE)
    (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("moeserve.client")]
    assert "large tensors travel in messages: it belongs to another user" in line


async def test_a_service_that_is_started_again_is_shared_with_again(connect: Callable[..., Calls], engine: FakeEngine) -> None:
    with served(engine, port=(port := kept_port())) as (target, _, _):
        calls = connect(target)
        await calls.forward(LARGE)
    with served(FakeEngine([(engine.layers[0], engine._experts[0])]), port=port):
        for number in range(3):
            assert torch.equal((await calls.forward(number * LARGE)).hidden_states, number * LARGE)


def test_nothing_is_left_of_a_client_that_ends_or_is_killed(target: str, engine: FakeEngine) -> None:
    def is_gone(memory: set[bytes]) -> bool:
        engine.requests.clear()  # they are its rows
        return not memory & mapped()

    before = mapped()
    with Client(target) as client:
        client.forward(LARGE)
        ended = mapped() - before
        assert ended
    until(lambda: is_gone(ended))
    calling = f"moeserve.Client({target!r}).forward(torch.ones({2**14}, {HIDDEN}))"
    code = f"import moeserve, torch, time; client = {calling}; print('done', flush=True); time.sleep(600)"
    before = mapped()
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"done\n"
        killed = mapped() - before
        assert killed
        process.send_signal(signal.SIGKILL)
    until(lambda: is_gone(killed))


def test_copies_share_memory_of_their_own(target: str) -> None:
    with Client(target) as client:
        client.forward(LARGE)
        copied = pickle.loads(pickle.dumps(client))
        assert torch.equal(copied.forward(2 * LARGE).hidden_states, 2 * LARGE)
        assert torch.equal(client.forward(LARGE).hidden_states, LARGE)
        copied.close()


class Guest:
    """What a caller with other intentions than our client's may do."""

    def __init__(self, target: str) -> None:
        self.channel = grpc.insecure_channel(target)
        self.stub = pb_grpc.MoEServiceStub(self.channel)
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.settimeout(10)
        self.sock.connect(b"\0" + self.stub.OpenMemory(pb.OpenMemoryRequest()).socket)

    def offer(self, fd: int, size: int) -> bytes:
        """The name of the memory; "" = it was refused."""
        try:
            socket.send_fds(self.sock, [size.to_bytes(8, "little")], [fd])
            return self.sock.recv(16)
        except OSError:
            return b""

    def ask(self, memory: bytes, offset: int = 0, reply_offset: int = 0, rows: int = 1024) -> pb.ForwardResponse:
        message = request(torch.zeros(rows, HIDDEN))
        message.hidden_states.data = b""
        message.shared.CopyFrom(pb.SharedBlock(memory=memory, offset=offset, reply_offset=reply_offset))
        return self.stub.Forward(message, timeout=10)

    def close(self) -> None:
        self.sock.close()
        self.channel.close()


@pytest.fixture
def guest(target: str) -> Iterator[Guest]:
    guest = Guest(target)
    yield guest
    guest.close()


def test_memory_that_could_shrink_is_refused(guest: Guest, tmp_path: Path) -> None:
    fd = os.memfd_create("unsealed")
    os.ftruncate(fd, 2**20)
    assert guest.offer(fd, 2**20) == b""
    os.close(fd)


@pytest.mark.parametrize("case", ["a file", "a directory", "too small", "too large", "nothing"])
def test_what_is_no_memory_is_refused(guest: Guest, tmp_path: Path, case: str) -> None:
    fd, _ = create_shared(2**16)
    (tmp_path / "file").write_bytes(bytes(2**16))
    opened = {"a file": tmp_path / "file", "a directory": tmp_path}.get(case)
    other = fd if opened is None else os.open(opened, os.O_RDONLY)
    size = {"too small": 2**17, "too large": memories.MAX_MEMORY_BYTES + 1, "nothing": 0}.get(case, 2**16)
    assert guest.offer(other, size) == b""
    for one in {fd, other}:
        os.close(one)
    assert torch.frombuffer(bytearray(guest.stub.Forward(request()).hidden_states.data), dtype=torch.float32).sum() > 0


def test_blocks_lie_in_the_memory(guest: Guest) -> None:
    fd, _ = create_shared(2**17)
    memory = guest.offer(fd, 2**17)
    os.close(fd)
    assert len(memory) == 16
    assert guest.ask(memory, 0, 2**16).is_shared
    for offset, reply in ((2**16 + 1, 0), (0, 2**16 + 1), (2**63, 0), (0, 2**64 - 1)):
        with pytest.raises(grpc.RpcError) as caught:
            guest.ask(memory, offset, reply)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(grpc.RpcError) as caught:
        guest.ask(b"another's memory", 0, 2**16)
    assert "is not shared with this process" in (caught.value.details() or "")


def test_rows_of_a_caller_that_leaves_meanwhile(guest: Guest, engine: FakeEngine) -> None:
    fd, _ = create_shared(2**17)
    memory = guest.offer(fd, 2**17)
    engine.gate.clear()
    answers: list[bool] = []
    asking = threading.Thread(target=lambda: answers.append(guest.ask(memory, 0, 2**16).is_shared))
    asking.start()
    until(lambda: engine.requests)
    guest.sock.close()
    os.close(fd)
    engine.open_gate()
    asking.join(30)
    assert answers == [True]


def test_only_so_many_callers_share(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memories, "MAX_MEMORIES", 2)
    guests = [Guest(target) for _ in range(3)]
    fd, _ = create_shared(2**16)
    assert [len(guest.offer(fd, 2**16)) for guest in guests] == [16, 16, 0]
    for guest in guests:
        guest.close()
    os.close(fd)


async def test_a_call_does_not_wait_longer_for_memory_than_it_may_take(
    connect: Callable[..., Calls], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service has accepted the caller and says nothing more; later it does."""
    with monkeypatch.context() as changed:
        changed.setattr(memories._Guest, "_on_readable", lambda guest: guest._loop.remove_reader(guest._sock.fileno()))
        with served(FakeEngine([(spec("layer"), identity)])) as (target, _, _):
            assert torch.equal((await connect(target).forward(LARGE, timeout=3)).hidden_states, LARGE)


async def test_a_service_without_a_free_descriptor_waits_for_one() -> None:
    known = memories.Memories()
    known.open()
    fd, _ = create_shared(2**16)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        with no_free_descriptors():
            sock.connect(b"\0" + known.name)
            began = time.thread_time()
            await asyncio.sleep(0.3)
            assert time.thread_time() - began < 0.1
        socket.send_fds(sock, [(2**16).to_bytes(8, "little")], [fd])
        assert len(await asyncio.to_thread(sock.recv, 16)) == 16
    os.close(fd)
    known.close()


def test_another_user_is_refused(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memories, "is_same_user", lambda sock: False)
    guest = Guest(target)
    fd, _ = create_shared(2**16)
    assert guest.offer(fd, 2**16) == b""
    os.close(fd)
    guest.close()


def test_its_bytes_count_as_those_of_messages(engine: FakeEngine) -> None:
    with (
        served(engine, max_queued_bytes=900_000, max_message_bytes=2**20) as (target, server, _),
        Client(target) as client,
        Client(target, retry=False) as other,
    ):
        client.forward(LARGE[: 2**13])
        engine.gate.clear()
        future = client.submit(LARGE[: 2**13])
        until(lambda: len(engine.requests) == 2)
        assert server.queue_bytes > 2**19
        with pytest.raises(errors.Overloaded):
            other.forward(LARGE[: 2**13])
        engine.open_gate()
        future.result(30)
        until(lambda: server.queue_bytes == 0)
