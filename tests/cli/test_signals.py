"""Signals as terminals and supervisors send them, at any moment, to real processes."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moeserve import Client, MoEServeError
from tests.support.followers import TOKEN, FrontendProcess
from tests.support.harness import ServiceHarness
from tests.support.held import Held
from tests.support.processes import blocks, command_lines, descendants, moeserve, open_threads, running, signal_all
from tests.support.waiting import until

LAYERS = [{"hidden_size": 16, "intermediate_size": 24, "num_experts": 4}]
CONFIG = {"layers": LAYERS, "placement": {"num_hosts": 2}, "resilience": {"request_timeout_s": 60.0}}
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
#: hosts are busy with it for minutes
LARGE = "[[layers]]\nhidden_size = 2048\nintermediate_size = 8192\nnum_experts = 64\n[placement]\nnum_hosts = 2\n"

#: as large, in small experts
MANY = "[[layers]]\nhidden_size = 64\nintermediate_size = 64\nnum_experts = 256\n" * 64 + "[placement]\nnum_hosts = 2\n"


@pytest.fixture
def service(tmp_path: Path) -> Iterator[ServiceHarness]:
    (tmp_path / "token").write_text(TOKEN)
    with ServiceHarness(CONFIG, "shm", tmp_path) as service:
        service.call(service.open_control())
        yield service


@pytest.fixture
def frontend(service: ServiceHarness, tmp_path: Path) -> Iterator[FrontendProcess]:
    with FrontendProcess(service.control_target, tmp_path / "token") as frontend:
        yield frontend


@pytest.mark.parametrize("number", SIGNALS)
def test_while_modules_are_imported(number: signal.Signals, tiny_moe: Path) -> None:
    with moeserve("serve", str(tiny_moe)) as process:
        assert process.stderr is not None and next(process.stderr).startswith("starting moeserve ")
        until(lambda: blocks(process.pid, signal.SIGTERM))
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (128 + number, f"ended by {number.name}\n")


@pytest.mark.ray
@pytest.mark.parametrize(("moment", "number"), [("starting Ray", signal.SIGTERM), ("loading", signal.SIGINT)])
def test_before_it_is_ready(moment: str, number: signal.Signals, tmp_path: Path) -> None:
    """The whole control group gets it; one sentence is said, and nothing is left."""
    (tmp_path / "service.toml").write_text(LARGE + "[server]\nport = 0\nmetrics_port = 0\n[ray]\ntemp_dir = '/tmp'\n")
    with moeserve("serve", str(tmp_path / "service.toml")) as process:
        assert process.stderr is not None
        while not next(process.stderr).startswith(moment):
            pass
        pids = [process.pid, *descendants(process.pid)]
        folder = Path(_keeper_of(pids)) if moment == "loading" else None
        signal_all(pids, number)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (128 + number, f"{number.name} before it was ready: stopping what was started\n")
    assert running(pids) == {}
    assert folder is None or not folder.exists()


@pytest.mark.parametrize("number", SIGNALS)
def test_while_hosts_that_are_threads_load(number: signal.Signals, tmp_path: Path) -> None:
    """Nobody waits for what they read, and their threads, in the middle of compiled code, do not abort the process at its end."""
    (tmp_path / "service.toml").write_text(MANY + "[server]\nport = 0\nmetrics_port = 0\n")
    with moeserve("serve", str(tmp_path / "service.toml"), "--cluster", "threads") as process:
        assert process.stderr is not None
        while not next(process.stderr).startswith("loading"):
            pass
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (128 + number, f"{number.name} before it was ready: stopping what was started\n")


@pytest.mark.ray
def test_kill_9_leaves_no_process_and_no_folder_for_long(tiny_moe: Path) -> None:
    """Its log is on a full disk, which nothing depends on."""
    flags = ("--port", "0", "--metrics-port", "0", "--num-hosts", "1")
    with open("/dev/full", "w") as full, moeserve("serve", str(tiny_moe), *flags, stdout=full, stderr=full) as process:
        until(lambda: process.poll() is not None or any("ExpertHost" in name for name in running(descendants(process.pid)).values()))
        assert process.poll() is None
        pids = descendants(process.pid)
        folder = Path(_keeper_of(pids))
        assert folder.is_dir()
    until(lambda: not running(pids), timeout_s=30)  # Ray alone would take a minute
    until(lambda: not folder.exists(), timeout_s=30)


def test_a_frontend_drains_when_its_terminal_closes_unless_it_is_to_ignore_that(service: ServiceHarness, tmp_path: Path) -> None:
    target = service.control_target
    token = tmp_path / "token"
    with FrontendProcess(target, token) as closed, FrontendProcess(target, token, before=["nohup"]) as kept:
        targets = [closed.target, kept.target]
        for frontend in (closed, kept):
            frontend.process.send_signal(signal.SIGHUP)
        closed.until("^stopped$")
        assert closed.process.wait(timeout=30) == 0
        with Client(targets[1]) as client:
            assert client.forward(torch.randn(2, 16)).processed.sum() == 4


def test_a_second_signal_ends_the_drain(service: ServiceHarness, frontend: FrontendProcess) -> None:
    held = [Held(host, 0) for host in service.hosts]
    with Client(frontend.target, timeout=60, retry=False) as client, ThreadPoolExecutor() as pool:
        waiting = pool.submit(client.forward, torch.randn(8, 16))
        held[0].begun.acquire()
        frontend.process.send_signal(signal.SIGTERM)
        frontend.until("^draining")
        frontend.process.send_signal(signal.SIGINT)
        frontend.until("^SIGINT: stopping at once$")
        assert frontend.process.wait(timeout=30) == 128 + signal.SIGINT
        with pytest.raises(MoEServeError):
            waiting.result(timeout=30)
        for one in held:
            one.leave.release()


def test_no_thread_but_one_gets_the_signals(frontend: FrontendProcess, tiny_moe: Path) -> None:
    """Another one would pass them to Python's handlers, past the drain."""
    flags = ("--port", "0", "--metrics-port", "0", "--num-hosts", "2", "--cluster", "threads")
    with moeserve("serve", str(tiny_moe), *flags) as serving:
        assert serving.stderr is not None and any(line.startswith("ready") for line in serving.stderr)
        assert frontend.target
        for process in (frontend.process, serving):
            assert {number: open_threads(process.pid, number) for number in SIGNALS} == dict.fromkeys(SIGNALS, 1)


def test_verbs_that_wait_for_an_answer(service: ServiceHarness, tmp_path: Path) -> None:
    """`infer` and `bench` end with one sentence, and with the code that a shell shows."""
    save_file({"hidden_states": torch.randn(8, 16)}, tmp_path / "x.safetensors")
    held = Held(service.hosts[0], 0)
    files = ("--input", str(tmp_path / "x.safetensors"), "--output", str(tmp_path / "y.safetensors"))
    for verb in (("infer", service.target, "--layer", "0", *files), ("bench", service.target)):
        with moeserve(*verb, stdout=subprocess.DEVNULL) as process:
            held.begun.acquire()
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=30)
        assert (process.returncode, err) == (143, "ended by SIGTERM\n")
        held.leave.release(100)
    assert not (tmp_path / "y.safetensors").exists()


def _keeper_of(pids: list[int]) -> str:
    """The private folder of the service, which is the argument of one of its processes."""
    return next(command[4] for command in command_lines(pids).values() if "keeper.py" in "".join(command))
