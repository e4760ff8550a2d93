"""An administrator ends a service whose hosts still load: nobody waits for them any more."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from moeserve.checkpoints.huggingface import HuggingFaceLayer
from moeserve.cli.app import main
from moeserve.config import load_config
from moeserve.loops import LoopThread
from moeserve.programs.controller import EndedBeforeReady
from moeserve.programs.frontend import FrontendProgram
from moeserve.programs.serve import Service
from tests.support.seeded_folders import configuration, folder
from tests.support.two_layers import CONFIG
from tests.support.waiting import until


def test_shutdown_before_it_is_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, answers, read = threading.Event(), threading.Event(), HuggingFaceLayer.experts

    def experts(self: HuggingFaceLayer, shards: object) -> object:
        asked.set()
        assert answers.wait(60)
        return read(self, shards)  # type: ignore[arg-type]

    monkeypatch.setattr(HuggingFaceLayer, "experts", experts)
    (tmp_path / "token").write_text("secret")
    server = {"port": 0, "metrics_port": 0, "admin_token_file": tmp_path / "token"}
    config = load_config({**configuration(folder(tmp_path / "served", 0)), "cluster": {"kind": "threads"}, "server": server})
    service, thread = Service(config), LoopThread("service")
    thread.start()
    try:
        starting = thread.submit(service.start())
        assert asked.wait(60)
        assert main(["shutdown", service.target, "--admin-token-file", str(tmp_path / "token")]) == 0
        with pytest.raises(EndedBeforeReady, match="an administrator has ended this service before it was ready"):
            starting.result(timeout=30)
    finally:
        answers.set()
        thread.stop()


def test_shutdown_while_a_frontend_does_not_reach_the_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    is_waiting = threading.Event()

    async def ready(self: FrontendProgram) -> None:
        is_waiting.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(FrontendProgram, "ready", ready)
    (tmp_path / "token").write_text("secret")
    server = {"port": 0, "metrics_port": 0, "admin_token_file": tmp_path / "token"}
    service, thread = Service(load_config({**CONFIG, "cluster": {"kind": "threads"}, "server": server})), LoopThread("service")
    thread.start()
    try:
        starting = thread.submit(service.start())
        assert is_waiting.wait(60)
        until(lambda: service.program._tasks)  # hosts are up, and watched
        assert main(["shutdown", service.target, "--admin-token-file", str(tmp_path / "token")]) == 0
        with pytest.raises(EndedBeforeReady):
            starting.result(timeout=30)
    finally:
        thread.stop()
