"""`moeserve serve`, and a program, when nothing can come back any more: they say why and end, for a supervisor to start them anew."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from moeserve import Client
from tests.support.processes import command_lines, descendants

pytestmark = pytest.mark.ray

FLAGS = ("--port", "0", "--metrics-port", "0", "--num-hosts", "2")


@contextmanager
def running(command: list[str], **more: object) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **more)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def said_until(process: subprocess.Popen[str], pattern: str) -> str:
    """All that it has said up to the first line that matches."""
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if re.search(pattern, line):
            return said
    raise AssertionError(f"{pattern} never came, but:\n{said}")


def serving(tiny_moe: Path) -> list[str]:
    return [sys.executable, "-c", "from moeserve.cli.app import entry; entry()", "serve", str(tiny_moe), *FLAGS]


def test_the_launch_folder_is_removed_and_a_host_dies(tiny_moe: Path, tmp_path: Path) -> None:
    """It serves on with the hosts it has, and ends when one is lost."""
    removed = "the folder that Ray was started in has been removed"
    launched = tmp_path / "launched"
    launched.mkdir()
    with running(serving(tiny_moe), cwd=launched) as process:
        said = said_until(process, "^ready ")
        hosts = [int(pid) for pid in re.findall(r"pid (\d+)", said)]
        launched.rmdir()
        assert removed in said_until(process, "hosts cannot be restarted any more")
        with Client(re.findall(r"^ready (.*)$", said, re.MULTILINE)[0]) as client:
            assert client.ready() and len(client.forward(torch.randn(16, 128)).hidden_states) == 16
        os.kill(hosts[1], signal.SIGKILL)
        ending = said_until(process, "^error: ")
        assert f"error: this service cannot continue and must be restarted: {removed}" in ending
        assert process.wait(timeout=60) == 1


def test_rays_memory_monitor_ends_hosts_before_they_are_there(tiny_moe: Path) -> None:
    """The real monitor, with a threshold that any machine is above."""
    with running(serving(tiny_moe), env={**os.environ, "RAY_memory_usage_threshold": "0.001"}) as process:
        ending = said_until(process, "^error: ")
        sentence = (
            r"error: host-\d died \d+ times while it loaded its experts\. It was to hold 3\.0 MiB of weights\. Ray says: .*low on memory"
        )
        assert re.match(sentence, ending.splitlines()[-1])
        assert process.wait(timeout=60) == 1


PROGRAM = """
import sys, time
import moeserve
with moeserve.serve({"model": {"checkpoint": sys.argv[1]}, "server": {"port": 0, "metrics_port": 0}}) as service:
    print("serving", flush=True)
    sys.stdin.readline()
    while service.failure is None:
        time.sleep(0.1)
    print("failure:", service.failure, flush=True)
    try:
        service.scale(2)
    except moeserve.ExpertUnavailable as error:
        print("scale:", error, flush=True)
print("the program goes on", flush=True)
"""


def test_a_program_outlives_its_service(tiny_moe: Path) -> None:
    """Without its raylet Ray has no way to go on, and its hosts end."""
    with running([sys.executable, "-c", PROGRAM, str(tiny_moe)], stdin=subprocess.PIPE) as process:
        said_until(process, "^serving$")
        os.kill(raylet_of(process.pid), signal.SIGKILL)
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
        ending = said_until(process, "^the program goes on$")
        for who in ("failure", "scale"):
            assert f"{who}: this service cannot continue and must be restarted: a process of Ray has ended: raylet" in ending
        assert process.wait(timeout=60) == 0


def raylet_of(pid: int) -> int:
    return next(child for child, (program, *_) in command_lines(descendants(pid)).items() if program.endswith("/raylet/raylet"))
