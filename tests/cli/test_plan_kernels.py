"""`moeserve plan --kernels`: what was measured for every shape of expert, and what is taken."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moeserve.cli.app import main
from moeserve.experts.choice import measured

TINY_MOE = Path(__file__).parents[2] / "examples" / "tiny-moe"


@pytest.fixture(autouse=True)
def _wide_and_undisturbed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("COLUMNS", "200")
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def planned(*arguments: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert main(["plan", str(TINY_MOE), *arguments]) == 0
    return [line for line in capsys.readouterr().out.splitlines() if "us per expert" in line or "chosen" in line or "as configured" in line]


def test_one_table_for_layers_that_are_alike(capsys: pytest.CaptureFixture[str]) -> None:
    title, *chosen = planned("--kernels", capsys=capsys)
    assert title.strip() == "us per expert and rows: bfloat16 swiglu, 128 x 256, 1 thread"
    assert chosen and all("chosen" in line for line in chosen)


def test_shards_and_threads_are_those_of_a_host(capsys: pytest.CaptureFixture[str]) -> None:
    title, *_ = planned("--kernels", "--num-hosts", "2", "--tensor-parallel", "2", "--cpus-per-host", "2", capsys=capsys)
    assert title.strip() == "us per expert and rows: bfloat16 swiglu, 128 x 128, 2 threads"


def test_a_kernel_can_be_pinned(capsys: pytest.CaptureFixture[str]) -> None:
    _, line = planned("--kernels", "--kernel", "generic", capsys=capsys)
    assert line.split() == ["generic", "as", "configured"]
    _, *lines = planned("--kernels", "--kernel", "torch", capsys=capsys)
    assert all(line.split()[0] == "torch," for line in lines)
    rows = {rows.strip(",") for line in lines for rows in line.split("chosen for")[1].split()}
    assert rows == {"1", "2", "4", "8", "16", "32", "64"}


def test_on_a_busy_machine_the_table_has_what_there_was_time_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("moeserve.experts.choice._LONGEST_S", 0.0)
    measured.cache_clear()
    try:
        assert main(["plan", str(TINY_MOE), "--kernels"]) == 0
    finally:
        measured.cache_clear()
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["kernel", "1"] in lines


def test_nothing_is_measured_unless_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert planned(capsys=capsys) == []


def test_a_kernel_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(TINY_MOE), "--kernels", "--kernel", "amx", "--dtype", "float32"]) == 2
    assert "model.kernel is 'amx', which cannot compute float32 swiglu experts here" in capsys.readouterr().err
