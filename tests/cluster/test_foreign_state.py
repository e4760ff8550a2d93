"""A controller that is started again, and finds the state of another version of moeserve."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from moeserve import load_config
from moeserve.cluster import ray_program
from moeserve.cluster.ray_program import _Runner
from moeserve.control.saved import StateUnreadable
from moeserve.programs.controller import ControllerProgram
from tests.support.harness import TestCluster
from tests.support.two_layers import CONFIG

SENTENCE = r"^the state of this service has been saved by another version .* \(KeyError: 'release'\): `moeserve deploy` starts "


async def test_it_says_so(tmp_path: Path) -> None:
    config = load_config(CONFIG)
    cluster = TestCluster(config, "local", tmp_path, ["this-node"])
    cluster.store.save(json.dumps({"service_id": "of another version"}).encode())
    program = ControllerProgram(config, cluster, lambda _: None)
    with pytest.raises(StateUnreadable, match=SENTENCE):
        await program.prepare(is_followed=True)
    await program.stop()


class Foreign:
    def __init__(self, tell: Callable[[str], None]) -> None:
        pass

    async def start(self) -> None:
        raise StateUnreadable("of another version")

    async def stop(self) -> None:
        raise AssertionError("what has not started cannot be stopped")

    def describe(self) -> None:
        raise AssertionError("what has not started cannot be described")


def test_it_waits_for_the_next_deploy_instead_of_starting_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any other error of a later incarnation ends its process, and Ray starts the next one."""
    later = SimpleNamespace(was_current_actor_reconstructed=True)
    monkeypatch.setattr(ray_program, "ray", SimpleNamespace(get_runtime_context=lambda: later))
    runner = _Runner(Foreign)
    with pytest.raises(StateUnreadable, match="of another version"):
        runner.ready()
    runner.stop()
    runner._thread.stop()
