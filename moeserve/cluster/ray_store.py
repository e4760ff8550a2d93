"""A few bytes that outlive actors: in Ray's own key-value store, which a restart of a controller does not touch."""

from __future__ import annotations

import threading
from concurrent.futures import Future, wait
from typing import Final

from moeserve.cluster.ray_internals import kv_delete, kv_get, kv_put
from moeserve.cluster.timing import SAVE_TIMEOUT_S
from moeserve.errors import ExpertUnavailable

_KEY: Final = b"moeserve:state"


class RayStore:
    """One value for each Ray namespace. What is saved and cleared is so in order, even when Ray does not answer for a while."""

    def __init__(self, namespace: str) -> None:
        self._key = _KEY + b":" + namespace.encode()
        #: done when the latest change has arrived, or has failed
        self._latest: Future[None] | None = None

    def load(self) -> bytes | None:
        """The saved bytes; None = nothing."""
        return kv_get(self._key)

    def save(self, value: bytes) -> None:
        """Replaces the saved bytes. Raises ExpertUnavailable when Ray does not answer in time; it has them as soon as it does.

        Whoever calls runs an event loop, and Ray tries for a minute: what is saved meanwhile is not waited for at all.
        """
        is_away = self._latest is not None and not self._latest.done()
        try:
            self._change(value).result(0.0 if is_away else SAVE_TIMEOUT_S)
        except TimeoutError:
            raise ExpertUnavailable("the state of the service cannot be saved: Ray's GCS does not answer") from None

    def clear(self) -> None:
        """Deletes the saved bytes; waits for Ray."""
        self._change(None).result()

    def _change(self, value: bytes | None) -> Future[None]:
        before, self._latest = self._latest, Future()
        threading.Thread(target=self._make, args=(value, before, self._latest), name="moeserve-store", daemon=True).start()
        return self._latest

    def _make(self, value: bytes | None, before: Future[None] | None, done: Future[None]) -> None:
        if before is not None:
            wait([before])  # an earlier value never arrives last
        try:
            kv_delete(self._key) if value is None else kv_put(self._key, value)
        except BaseException as error:  # any error, of Ray for example: whoever waits gets it
            done.set_exception(error)
        else:
            done.set_result(None)
