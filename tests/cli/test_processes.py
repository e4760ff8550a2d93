"""`moeserve serve --processes N`: several processes that are one service, on one port."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest
import torch

from moeserve import Client, EmbeddedClient, MoELayer
from moeserve.client import AdminClient
from tests.support.closeness import assert_close
from tests.support.processes import command_lines, descendants, moeserve, running
from tests.support.seeded_folders import folder, tokens
from tests.support.waiting import until

Said = Callable[[str], re.Match[str]]
REPOSITORY = Path(__file__).parents[2]
ADMIN, CALLER = "admin-token-of-the-test", "caller-token-of-the-test"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("model") / "0", 0)


def frontends(pid: int) -> list[int]:
    return [one for one, words in command_lines(descendants(pid)).items() if "moeserve.programs.frontend_process" in words]


def saying(process: subprocess.Popen[str]) -> Said:
    def until_said(pattern: str) -> re.Match[str]:
        seen = []
        assert process.stderr is not None
        for line in process.stderr:
            seen.append(line)
            if match := re.search(pattern, line):
                return match
        raise AssertionError(f"{pattern} never came, but:\n{''.join(seen)}")

    return until_said


class Started:
    """A service of two processes."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process, self.said = process, saying(process)
        self.metrics = self.said(r"^metrics at (http://\S+)")[1]
        self.target = self.said(r"^ready (127\.0\.0\.1:\d+)$")[1]

    def clients(self, stack: ExitStack, count: int = 24) -> list[Client]:
        """Each has a connection of its own, so together they reach every process (all but once in a million times)."""
        return [stack.enter_context(Client(self.target, token=CALLER)) for _ in range(count)]

    def counted(self) -> float:
        with urllib.request.urlopen(self.metrics) as answer:  # it is ours
            text = answer.read().decode()
        return float(re.search(r'^moeserve_requests_total\{code="OK",method="Forward"\} (\S+)$', text, re.MULTILINE)[1])  # type: ignore[index]


@pytest.fixture
def started(checkpoint: Path, tmp_path: Path) -> Iterator[Started]:
    for name, token in (("admin", ADMIN), ("caller", CALLER)):
        (tmp_path / name).write_text(token)
    files = ("--admin-token-file", str(tmp_path / "admin"), "--auth-token-file", str(tmp_path / "caller"))
    flags = (
        "--cluster",
        "threads",
        "--port",
        "0",
        "--metrics-port",
        "0",
        "--dtype",
        "float32",
        "--num-hosts",
        "2",
        "--processes",
        "2",
        "--num-cpus",
        "4",
    )
    with moeserve("serve", str(checkpoint), *flags, *files) as process:
        yield Started(process)


def test_one_service_of_two_processes(started: Started, checkpoint: Path) -> None:
    """They answer alike, are counted as one, obey an administrator whichever of them he reaches, come back, and drain together."""
    layer = MoELayer.from_checkpoint(checkpoint, dtype=torch.float32)
    first = set(frontends(started.process.pid))
    assert len(first) == 1
    with ExitStack() as stack, ThreadPoolExecutor(24) as pool:
        clients = started.clients(stack)
        for number, answer in enumerate(pool.map(lambda one: one[1].forward(tokens(one[0])), enumerate(clients))):
            assert_close(answer.hidden_states, layer(tokens(number)))
        by_process = [sum(call.count for call in client.stats().calls if call.method == "Forward") for client in clients]
        assert max(by_process) < 24
        until(lambda: started.counted() == 24)  # a process that does not answer in time is left out

        for index in range(12):
            with AdminClient(started.target, ADMIN) as admin:
                status = admin.status()
                assert sorted(frontend.name for frontend in status.frontends) == ["serve", "serve-1"]
                if index == 0:
                    assert admin.scale(3).epoch == 2
        assert {client.stats().epoch for client in clients} == {2}

        tokens_are_asked_for(started.target)
        for _ in range(8):  # each on a connection of its own
            with EmbeddedClient(started.target) as program:  # of the same user, which needs no token
                assert_close(program.forward(tokens(0)).hidden_states, layer(tokens(0)))

        for pid in first:
            os.kill(pid, signal.SIGKILL)
        until(lambda: len(set(frontends(started.process.pid)) - first) == 1)
        list(pool.map(lambda client: client.forward(tokens(0)), clients))  # made again where their process is gone
        with AdminClient(started.target, ADMIN) as admin:
            until(lambda: len([one for one in admin.status().frontends if one.is_ready]) == 2)
        assert started.counted() >= 24

    children = descendants(started.process.pid)
    started.process.send_signal(signal.SIGTERM)
    assert started.said("^(stopped$|Fatal Python error)")[1] == "stopped"
    assert started.process.wait(30) == 0
    assert running(children) == {}


def tokens_are_asked_for(target: str) -> None:
    """By each process, on both services."""
    for _ in range(12):
        with grpc.insecure_channel(target, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            for method in ("MoEService/ListLayers", "AdminService/GetPlacement"):
                with pytest.raises(grpc.RpcError) as caught:
                    channel.unary_unary(f"/moeserve.v1.{method}")(b"", timeout=10)
                assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            with pytest.raises(grpc.RpcError) as caught:
                next(channel.stream_stream("/moeserve.v1.ControlService/Follow")(iter([b""]), timeout=10))
            assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED  # no token would be the right one
            drain = channel.unary_unary("/moeserve.v1.AdminService/DrainHost")
            with pytest.raises(grpc.RpcError) as caught:
                drain(b"\xff", timeout=10, metadata=[("authorization", f"Bearer {ADMIN}")])
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_they_end_with_the_first_one(started: Started) -> None:
    children = frontends(started.process.pid)
    assert len(children) == 1
    started.process.kill()
    started.process.wait(30)
    until(lambda: running(children) == {})
    until(lambda: not listens(int(started.target.rpartition(":")[2])))


def test_what_packages_print_in_a_further_process_is_not_taken_for_its_answer(tmp_path: Path) -> None:
    loud = "import torch\nbefore = torch.set_num_threads\ntorch.set_num_threads = lambda number: (print('hello'), before(number))\n"
    (tmp_path / "sitecustomize.py").write_text(loud)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    told = {"server": {"port": "none"}, "controller": "127.0.0.1:1", "token": "", "token_file": None, "name": "serve-1", "node": ""}
    command, pipe = [sys.executable, "-m", "moeserve.programs.frontend_process"], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment, cwd=REPOSITORY) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps({**told, "log_level": logging.WARNING}) + "\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["error"].startswith("server: ")
        rest, printed = process.communicate()
    assert (rest, "hello" in printed) == ("", True)


def listens(port: int) -> bool:
    """Whether anybody does: a process that ends closes its sockets after it has left the list of those that run."""
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0
