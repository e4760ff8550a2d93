"""A few bytes that outlive actors: in Ray's own key-value store, which a restart of a controller does not touch."""

from __future__ import annotations

from typing import Final

from moeserve.cluster.ray_internals import kv_delete, kv_get, kv_put

_KEY: Final = b"moeserve:state"


class RayStore:
    """One value for each Ray namespace."""

    def __init__(self, namespace: str) -> None:
        self._key = _KEY + b":" + namespace.encode()

    def load(self) -> bytes | None:
        """The saved bytes; None = nothing."""
        return kv_get(self._key)

    def save(self, value: bytes) -> None:
        """Replaces the saved bytes."""
        kv_put(self._key, value)

    def clear(self) -> None:
        """Deletes the saved bytes."""
        kv_delete(self._key)
