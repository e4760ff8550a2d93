"""A few bytes that outlive actors: in Ray's own key-value store, which a restart of a controller does not touch."""

from __future__ import annotations

from typing import Final

from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put

_KEY: Final = b"moeserve:state"


class RayStore:
    """One value for each Ray namespace."""

    def __init__(self, namespace: str) -> None:
        self._key = _KEY + b":" + namespace.encode()

    def load(self) -> bytes | None:
        """What was saved last; None = nothing."""
        value: bytes | None = _internal_kv_get(self._key)
        return value

    def save(self, value: bytes) -> None:
        """Replaces what was there."""
        _internal_kv_put(self._key, value, overwrite=True)

    def clear(self) -> None:
        """Nothing is saved any more."""
        _internal_kv_del(self._key)
