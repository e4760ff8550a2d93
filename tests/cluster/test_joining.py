"""Joining a cluster at an address where there is none, or where nobody answers: said in one sentence, and in nobody's way."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
import ray

from moeserve import ConfigError
from moeserve.cluster import ray_runtime
from moeserve.cluster.ray_runtime import RayRuntime, knock
from moeserve.config import PlacementConfig, RayConfig


def test_what_listens_there_is_no_ray() -> None:
    with ThreadPoolExecutor(1) as pool:
        server = grpc.server(pool)
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        with pytest.raises(ConfigError, match=rf"^no Ray cluster answers at {address}: what listens there is none; allowed: the head"):
            knock(address)
        server.stop(None).wait()


@pytest.mark.parametrize("address", ["127.0.0.1:99999", "ray://127.0.0.1:10001", "nowhere"])
def test_an_address_that_cannot_be(address: str) -> None:
    with pytest.raises(ConfigError, match=address):
        knock(address)


def test_nobody_waits_for_a_cluster_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, gone = threading.Event(), threading.Event()
    runtime = RayRuntime(RayConfig(address="127.0.0.1:6379"), PlacementConfig())

    def knock(address: str) -> None:
        asked.set()
        assert gone.wait(60)
        raise ConfigError(f"no Ray cluster answers at {address}")

    monkeypatch.setattr(ray_runtime, "knock", knock)
    with ThreadPoolExecutor(2) as pool:
        starting = pool.submit(runtime.start)
        assert asked.wait(60)
        try:
            pool.submit(runtime.stop).result(timeout=30)
            assert not starting.done()
        finally:
            gone.set()
        with pytest.raises(ConfigError):
            starting.result()


def test_a_cluster_that_was_joined_too_late_is_left_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, answers, left = threading.Event(), threading.Event(), threading.Event()

    def init(**_: object) -> None:
        asked.set()
        assert answers.wait(60)

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", left.set)
    monkeypatch.setattr(ray_runtime, "knock", lambda _: None)
    runtime = RayRuntime(RayConfig(address="127.0.0.1:6379"), PlacementConfig())
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(runtime.start)
        assert asked.wait(60)
        runtime.stop()
        assert not left.is_set()
        answers.set()
        starting.result()
    assert left.is_set()


def test_a_cluster_of_another_version_is_said_in_one_whole_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: object) -> None:
        raise RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.55.0\n    Python: 3.11.2\nThis process on ...")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray_runtime, "knock", lambda _: None)
    sentence = r"^the Ray cluster at 10\.0\.0\.1:6379 cannot be joined: Version mismatch: The cluster was started with: Ray: 2\.55\.0 "
    with pytest.raises(ConfigError, match=sentence):
        RayRuntime(RayConfig(address="10.0.0.1:6379"), PlacementConfig()).start()
