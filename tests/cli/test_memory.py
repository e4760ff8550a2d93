"""Memory of a real service and its hosts: what callers of every kind leave behind goes back to the kernel, round after round."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import torch

from moeserve.api.wire import WireRequest, encode_forward_request
from tests.support.processes import moeserve
from tests.support.waiting import until

pytestmark = [pytest.mark.ray, pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="asks Linux for the memory of a process")]

# Calls by the dozen until it is killed: most are cancelled or too late, streams are left, some messages are nonsense and some large.
CALLER = r"""
import pathlib, random, sys, threading, time
import grpc
target, folder = sys.argv[1:]
messages = [path.read_bytes() for path in sorted(pathlib.Path(folder).iterdir())] + [b"\xff" * 2**24]
channel = grpc.insecure_channel(target, options=[("grpc.max_receive_message_length", -1)])
forward = channel.unary_unary("/moeserve.v1.MoEService/Forward")
stream = channel.stream_stream("/moeserve.v1.MoEService/ForwardStream")
def one_by_one():
    while True:
        calls = [forward.future(random.choice(messages), timeout=random.choice((0.01, 0.05, 0.5, 10))) for _ in range(8)]
        time.sleep(random.uniform(0, 0.2))
        for call in calls[::2]: call.cancel()
        for call in calls: call.cancelled() or call.exception()
def streams():
    while True:
        answers = stream(iter(random.choices(messages, k=40)))
        try:
            for _ in range(random.randrange(8)): next(answers)
        except grpc.RpcError: pass
        answers.cancel()
def never_read():
    kept = [stream(iter(messages * 3)) for _ in range(4)]
    threading.Event().wait()
for behavior in (one_by_one, one_by_one, streams, never_read): threading.Thread(target=behavior, daemon=True).start()
print("calling", flush=True)
threading.Event().wait()
"""
ROUNDS, LOAD_S = 3, 2.5
#: more than after a few ordinary requests; under way they take several times as much
ALLOWED_MB = 150


@pytest.fixture
def running(tiny_moe: Path, tmp_path: Path) -> Iterator[tuple[str, dict[str, int], Path]]:
    """Where it is, its processes and its log."""
    log = tmp_path / "log"
    flags = ("--port", "0", "--metrics-port", "0", "--num-hosts", "2", "--kernel", "torch")
    with log.open("w") as stderr, moeserve("serve", str(tiny_moe), *flags, stderr=stderr) as process:
        until(lambda: re.search(r"^ready (.+)$", log.read_text(), re.MULTILINE) is not None or process.poll() is not None)
        target = re.search(r"^ready (.+)$", log.read_text(), re.MULTILINE)
        assert target is not None, log.read_text()
        hosts = re.findall(r"^(host-\d+) ready .* pid (\d+) ", log.read_text(), re.MULTILINE)
        yield target[1], {"service": process.pid, **{name: int(pid) for name, pid in hosts}}, log
        process.terminate()
        process.wait(60)


def resident_mb(pid: int) -> int:
    """Anonymous memory, and what is shared between frontends and hosts."""
    status = Path(f"/proc/{pid}/status").read_text()
    return sum(int(size) for size in re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+) kB", status, re.MULTILINE)) // 1024


def test_it_does_not_grow_with_callers_that_leave(running: tuple[str, dict[str, int], Path], tmp_path: Path) -> None:
    target, processes, log = running
    folder = tmp_path / "messages"
    folder.mkdir()
    for number in range(40):
        rows = torch.randn(int(torch.randint(1, 4000, ())), 128)
        (folder / str(number)).write_bytes(encode_forward_request(WireRequest(rows, layer=number % 4)))
    with grpc.insecure_channel(target) as channel:
        for path in folder.iterdir():
            channel.unary_unary("/moeserve.v1.MoEService/Forward")(path.read_bytes(), timeout=60)
    before = {name: resident_mb(pid) for name, pid in processes.items()}
    for _ in range(ROUNDS):
        caller = subprocess.Popen([sys.executable, "-c", CALLER, target, str(folder)], stdout=subprocess.PIPE)
        try:
            assert caller.stdout is not None and caller.stdout.readline()
            time.sleep(LOAD_S)
        finally:
            caller.kill()
            caller.communicate()
        until(lambda: all(resident_mb(pid) < before[name] + ALLOWED_MB for name, pid in processes.items()), timeout_s=60)
    assert "Traceback" not in log.read_text()
