"""`moeserve serve` as a user runs it: a process of its own, with a Ray of its own."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moeserve import Client, ExpertUnavailable, MoELayer
from moeserve.cli.app import main
from tests.support.closeness import assert_close
from tests.support.processes import command_lines, descendants, signal_all
from tests.support.processes import running as alive

pytestmark = pytest.mark.ray


def moeserve(*argv: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from moeserve.cli.app import entry; entry()", *argv]
    env = {**os.environ, **environment}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def read_until(process: subprocess.Popen[str], pattern: str) -> re.Match[str]:
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        seen.append(line)
        if match := re.search(pattern, line):
            return match
    raise AssertionError(f"{pattern} never came, but:\n{''.join(seen)}")


@pytest.fixture(scope="module")
def running(tiny_moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """With a TMPDIR in which the path of a socket would be too long."""
    flags = ("--port", "0", "--metrics-port", "0", "--num-hosts", "2", "--dtype", "float32")
    process = moeserve("serve", str(tiny_moe), *flags, TMPDIR=str(tmp_path_factory.mktemp("long" * 25)))
    with process:
        try:
            yield process, read_until(process, r"^ready (127\.0\.0\.1:\d+)$")[1]
        finally:
            process.kill()


def test_infer_against_it(running: tuple[subprocess.Popen[str], str], tiny_moe: Path, tmp_path: Path) -> None:
    _, target = running
    layer = MoELayer.from_checkpoint(tiny_moe, 2, dtype=torch.float32)
    hidden_states = torch.randn(5, layer.spec.hidden_size)
    save_file({"hidden_states": hidden_states}, tmp_path / "x.safetensors")
    for name in ("2", "model.layers.2.mlp"):
        files = ("--input", str(tmp_path / "x.safetensors"), "--output", str(tmp_path / "y.safetensors"))
        assert main(["infer", target, "--layer", name, "--return-routing", *files]) == 0
        answer = load_file(tmp_path / "y.safetensors")
        assert_close(answer["hidden_states"], layer(hidden_states))
        assert answer["requested"].sum() == 10 and answer["topk_ids"].shape == (5, 2)


def test_a_port_in_use_is_said_in_one_sentence(tiny_moe: Path) -> None:
    """A frontend listens the same way wherever its hosts run: no Ray is started for this."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        second = moeserve("serve", str(tiny_moe), "--cluster", "threads", "--port", port, "--metrics-port", "0")
        _, err = second.communicate(timeout=120)
    assert second.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in err.splitlines()[-1]


def test_a_ray_that_does_not_answer(tiny_moe: Path) -> None:
    process = moeserve("serve", str(tiny_moe), "--address", "127.0.0.1:1", "--port", "0", "--metrics-port", "0")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert err.splitlines()[-1].startswith("error: no Ray cluster answers at 127.0.0.1:1")


def raylet_socket(pids: list[int]) -> Path:
    arguments = {argument for command in command_lines(pids).values() for argument in command}
    [name] = [argument for argument in arguments if argument.startswith("--raylet_socket_name=")]
    return Path(name.partition("=")[2])


def test_another_user_reads_no_log_and_moves_no_socket(running: tuple[subprocess.Popen[str], str]) -> None:
    process, _ = running
    socket_path = raylet_socket(descendants(process.pid))
    log = socket_path.parents[1] / "logs" / "raylet.out"
    assert socket_path.is_socket() and log.is_file()
    assert any(folder.stat().st_mode & 0o777 == 0o700 for folder in socket_path.parents)
    if os.geteuid() != 0:
        pytest.skip("only root can try as another user")
    for command in (["mv", socket_path, socket_path.with_name("moved")], ["cat", log], ["touch", socket_path.with_name("more")]):
        tried = subprocess.run(command, user=65534, group=65534, extra_groups=[], capture_output=True, text=True, check=False)
        assert tried.returncode != 0 and "Permission denied" in tried.stderr, command


def test_sigterm_drains(running: tuple[subprocess.Popen[str], str]) -> None:
    """The last test of this module: what runs when SIGTERM comes is answered, later requests are refused, and the exit code is 0.

    Every process of the service gets it at once, as systemd does it, and nobody reads any more what the service says.
    """
    process, target = running
    hidden_states = torch.randn(60_000, 128)
    pids = [process.pid, *descendants(process.pid)]
    folder = raylet_socket(pids).parents[3]
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    process.stderr.close()

    def slow() -> int:
        with Client(target, timeout=60.0) as client:
            return len(client.forward(hidden_states, layer=0).hidden_states)

    with ThreadPoolExecutor() as pool, Client(target, retry=False) as client:
        assert client.ready()
        waiting = pool.submit(slow)
        while client.stats().queue_tokens == 0:
            if waiting.done():  # before it was seen
                assert waiting.result() == 60_000
                waiting = pool.submit(slow)
        signal_all(pids, signal.SIGTERM)
        with pytest.raises(ExpertUnavailable):
            while True:
                client.forward(hidden_states[:1], layer=0)
        assert waiting.result() == 60_000
    assert process.wait(timeout=60) == 0
    assert alive(pids) == {}
    assert not folder.exists()
