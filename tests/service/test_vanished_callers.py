"""A service and its callers as processes of their own: callers that are killed, never read, or bring more than there is room for.

What is left of them is nothing: no bytes, no tokens, no descriptors, no threads, and the memory goes back to the kernel while others are
served.
"""

from __future__ import annotations

import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from moeserve import Client
from moeserve.api.wire import WireRequest, encode_forward_request
from tests.support.processes import moeserve
from tests.support.waiting import until

pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="asks Linux for the memory of a process")

MIB = 2**20
CONFIG = f"""
[[layers]]
hidden_size = 64
intermediate_size = 32
num_experts = 8
[placement]
num_hosts = 2
copies = 2
[server]
port = 0
metrics_port = 0
max_message_bytes = {128 * MIB}
max_queued_bytes = {128 * MIB}
"""
#: what a frontend may keep for itself, and threads and files that come with the first calls
ALLOWED_MIB, ALLOWED_FEW = 100, 8

CALLER = r"""
import sys, threading
import grpc
target, path, how = sys.argv[1:]
message = open(path, "rb").read()
options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
channels = [grpc.insecure_channel(target, options=options) for _ in range(8)]
service = "/moeserve.v1.MoEService/"
if how == "streams":
    kept = [channel.stream_stream(service + "ForwardStream")(iter([message] * 400)) for channel in channels]
elif how == "messages":
    noise = b"\xff" * len(message)
    kept = [channel.unary_unary(service + "Forward").future(one, timeout=60) for channel, one in zip(channels, (message, noise) * 4)]
    print(*{call.exception() and call.exception().code().name for call in kept}, flush=True)
elif how == "silence":
    def never():
        threading.Event().wait()
        yield b""
    kept = [channel.stream_stream(service + "Forward")(never()) for channel in channels]
print("called", flush=True)
threading.Event().wait()
"""


@dataclass
class Served:
    pid: int
    target: str
    metrics: str

    def gauge(self, name: str) -> float:
        with urllib.request.urlopen(self.metrics) as page:
            return sum(map(float, re.findall(rf"^moeserve_{name}(?:{{.*}})? (\S+)$", page.read().decode(), re.MULTILINE)))

    def status(self, key: str) -> int:
        found = re.search(rf"^{key}:\s+(\d+)", Path(f"/proc/{self.pid}/status").read_text(), re.MULTILINE)
        assert found is not None
        return int(found[1])

    @property
    def resident_mib(self) -> int:
        return self.status("VmRSS") // 1024

    @property
    def connections(self) -> int:
        """Of callers, at the port of the service."""
        at = f":{int(self.target.rpartition(':')[2]):04X}"
        tables = (Path(f"/proc/{self.pid}/net/{table}").read_text() for table in ("tcp", "tcp6"))
        lines = [line.split() for table in tables for line in table.splitlines()[1:]]
        return sum(local.endswith(at) and state == "01" for _, local, _, state, *_ in lines)

    @property
    def descriptors(self) -> int:
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("vanished")
    (folder / "service.toml").write_text(CONFIG)
    with moeserve("serve", str(folder / "service.toml"), "--cluster", "threads") as process:
        assert process.stderr is not None
        told: dict[str, str] = {}
        while "ready" not in told:
            line = process.stderr.readline()
            assert line, told
            told |= dict([found.groups()]) if (found := re.match(r"(ready|metrics at) (\S+)", line)) else {}
        running = Served(process.pid, told["ready"], told["metrics at"])
        with Client(running.target) as client:
            client.forward(torch.randn(1024, 64))
        yield running


@contextmanager
def caller(served: Served, folder: Path, how: str, message: bytes) -> Iterator[str]:
    """A process that is killed in the end; yields what it has said when it has called."""
    (folder / "message").write_bytes(message)
    with subprocess.Popen([sys.executable, "-c", CALLER, served.target, str(folder / "message"), how], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        said = b""
        while b"called" not in said:
            line = process.stdout.readline()
            assert line
            said += line
        try:
            yield said.decode()
        finally:
            process.kill()


def nothing_is_left(served: Served, before: tuple[int, int]) -> bool:
    descriptors, threads = before
    gauges = [served.gauge(name) for name in ("queue_tokens", "queue_bytes", "host_queue_tokens")]
    return not any(gauges) and served.descriptors <= descriptors + 1 and served.status("Threads") <= threads + ALLOWED_FEW


ROWS = encode_forward_request(WireRequest(torch.randn(4096, 64)))


@pytest.mark.parametrize(("how", "message"), [("streams", ROWS), ("silence", b"")])
def test_callers_that_are_killed_leave_nothing(served: Served, tmp_path: Path, how: str, message: bytes) -> None:
    before = served.descriptors, served.status("Threads")
    with caller(served, tmp_path, how, message):
        until(lambda: served.connections >= 8)
        if how == "streams":
            until(lambda: served.gauge("queue_bytes") > MIB)
        with Client(served.target) as client:
            assert client.forward(torch.ones(2, 64)).hidden_states.isfinite().all()
    until(lambda: nothing_is_left(served, before))


def test_memory_is_bounded_and_falls_back(served: Served, tmp_path: Path) -> None:
    """Eight messages of 96 MiB at once, half of them noise, and room for one; beside a caller that is never refused and keeps it busy."""
    idle = served.resident_mib
    Path(f"/proc/{served.pid}/clear_refs").write_text("5")  # the peak is that of from now on
    message = encode_forward_request(WireRequest(torch.zeros(6 * 2**16, 64)))
    with Client(served.target) as client, caller(served, tmp_path, "messages", message) as said:
        assert set(said.split()) <= {"INVALID_ARGUMENT", "RESOURCE_EXHAUSTED", "called"}
        assert served.status("VmHWM") // 1024 < idle + 6 * 96 + ALLOWED_MIB

        def has_fallen() -> bool:
            client.forward(torch.ones(8, 64))
            return served.resident_mib < idle + ALLOWED_MIB

        until(has_fallen)
    until(lambda: served.gauge("queue_bytes") == 0)
