"""Whether somebody reads what is said decides nothing: closed pipes, full disks, closed descriptors, readers that stand still."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moeserve import Client
from tests.support.followers import TOKEN, FrontendProcess
from tests.support.harness import ServiceHarness
from tests.support.processes import moeserve
from tests.support.waiting import until

CONFIG = {"layers": [{"hidden_size": 16, "intermediate_size": 24, "num_experts": 4}], "placement": {"num_hosts": 1}}


@pytest.fixture
def service(tmp_path: Path) -> Iterator[ServiceHarness]:
    with ServiceHarness(CONFIG, "shm", tmp_path) as service:
        yield service


@pytest.fixture
def nobody_reads() -> Iterator[int]:
    """A pipe whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


def test_a_reader_who_has_had_enough_ends_a_verb_as_usual(service: ServiceHarness, nobody_reads: int, tiny_moe: Path) -> None:
    """`moeserve plan ... | head -1`: no traceback, no other code."""
    too_much = ("plan", str(tiny_moe), "--memory-per-host-bytes", "1")  # which is found after everything has been put out
    for verb in (("plan", str(tiny_moe)), too_much, ("top", service.target, "--json", "--interval-s", "0.01")):
        with moeserve(*verb, stdout=nobody_reads) as process:
            _, err = process.communicate(timeout=60)
        if verb is too_much:
            assert process.returncode == 2 and err.startswith("error: ") and err.count("\n") == 1
        else:
            assert (process.returncode, err) == (0, "")


def test_what_a_verb_is_for_must_be_written_and_what_it_says_beside_that_need_not(
    service: ServiceHarness, tiny_moe: Path, tmp_path: Path
) -> None:
    save_file({"hidden_states": torch.randn(3, 16)}, tmp_path / "x.safetensors")
    files = ("--input", str(tmp_path / "x.safetensors"), "--output", str(tmp_path / "y.safetensors"))
    with open("/dev/full", "w") as full:
        with moeserve("plan", str(tiny_moe), stdout=full) as plan:
            _, err = plan.communicate(timeout=60)
        assert (plan.returncode, err) == (1, "error: cannot write to the standard output: No space left on device\n")
        with moeserve("infer", service.target, "--layer", "0", *files, stdout=full, stderr=full) as infer:
            assert infer.wait(timeout=60) == 0
    assert load_file(tmp_path / "y.safetensors")["hidden_states"].shape == (3, 16)


def test_closed_descriptors_are_taken_by_nothing_else(service: ServiceHarness) -> None:
    """A connection or a file would be in their place, and what libraries print would end up in it."""
    closed = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-m", "moeserve", "bench", service.target, "--duration-s", "600"]
    with subprocess.Popen(closed) as process:
        files = [Path(f"/proc/{process.pid}/fd/{number}") for number in range(3)]
        try:
            with Client(service.target) as client:
                until(lambda: sum(layer.tokens for layer in client.stats().layers) > 0)
            assert [os.readlink(file) for file in files] == ["/dev/null"] * 3
        finally:
            process.terminate()
        assert process.wait(timeout=30) == 143


def test_a_frontend_serves_on_when_its_log_is_not_read(service: ServiceHarness, tmp_path: Path) -> None:
    """The pipe is full from the start, and whoever should read it stands still: who waited for him would never serve."""
    (tmp_path / "token").write_text(TOKEN)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(1000))
    os.set_blocking(writer, True)
    service.call(service.open_control())
    with FrontendProcess(service.control_target, tmp_path / "token", stderr=writer) as frontend:
        (target,) = until(lambda: [one.target for one in service.frontends.members() if one.is_ready and one.name != "serve"])
        with Client(target) as client:
            assert client.forward(torch.randn(2, 16)).processed.sum() == 4
        frontend.process.terminate()
        assert frontend.process.wait(timeout=30) == 0
    os.close(reader)
    os.close(writer)
