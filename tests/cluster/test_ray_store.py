"""The state of a controller, while Ray does not answer."""

from __future__ import annotations

import threading

import pytest

from moeserve import ExpertUnavailable
from moeserve.cluster import ray_store
from moeserve.cluster.ray_store import RayStore


def test_what_is_saved_while_ray_does_not_answer_arrives_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """And holds up nobody meanwhile: the first one only for a while, and those behind it not at all."""
    answers, arrived = threading.Event(), list[bytes | None]()

    def put(key: bytes, value: bytes) -> None:
        assert answers.wait(60)
        arrived.append(value)

    monkeypatch.setattr(ray_store, "kv_put", put)
    monkeypatch.setattr(ray_store, "kv_delete", lambda _: arrived.append(None))
    monkeypatch.setattr(ray_store, "SAVE_TIMEOUT_S", 0.01)
    store = RayStore("namespace")
    with pytest.raises(ExpertUnavailable, match="the state of the service cannot be saved: Ray's GCS does not answer"):
        store.save(b"1")
    monkeypatch.setattr(ray_store, "SAVE_TIMEOUT_S", 3600.0)
    for value in (b"2", b"3"):
        with pytest.raises(ExpertUnavailable):
            store.save(value)
    answers.set()
    store.clear()
    store.save(b"4")
    assert arrived == [b"1", b"2", b"3", None, b"4"]


def test_an_error_of_ray_is_no_secret_and_does_not_last(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = [ValueError("of Ray")]

    def put(key: bytes, value: bytes) -> None:
        if errors:
            raise errors.pop()

    monkeypatch.setattr(ray_store, "kv_put", put)
    store = RayStore("namespace")
    with pytest.raises(ValueError, match="of Ray"):
        store.save(b"1")
    store.save(b"2")
