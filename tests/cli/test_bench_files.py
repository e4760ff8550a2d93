"""`moeserve bench` where costs or a record cannot be had."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from moeserve.cli.app import main
from tests.support.harness import ServiceHarness

CONFIG = {"layers": [{"hidden_size": 16, "intermediate_size": 8, "num_experts": 4, "gating": {"top_k": 2}}], "placement": {"num_hosts": 1}}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceHarness]:
    with ServiceHarness(CONFIG, "local", tmp_path_factory.mktemp("s")) as harness:
        yield harness


def test_costs_are_those_of_one_frontend(capsys: pytest.CaptureFixture[str], service: ServiceHarness, tmp_path: Path) -> None:
    """A client goes to all that a name stands for in turn."""
    with ServiceHarness(CONFIG, "local", tmp_path) as other:
        assert main(["bench", f"ipv4:{service.target},{other.target}", "--costs", str(tmp_path / "costs.json")]) == 2
    assert "--costs needs the counts of one frontend" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--costs", "--record"])
def test_a_full_disk_is_said(capsys: pytest.CaptureFixture[str], service: ServiceHarness, option: str) -> None:
    assert main(["bench", service.target, option, "/dev/full", "--requests", "10"]) == 2
    assert capsys.readouterr().err == "error: /dev/full cannot be written: No space left on device\n"
