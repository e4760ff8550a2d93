"""Experts of a layer that are read again, perhaps days after its files were described."""

from __future__ import annotations

from collections.abc import Callable

from moeserve.checkpoints import LayerSource, load_experts
from moeserve.errors import CheckpointChanged, CheckpointError
from moeserve.experts import Expert, ExpertShard


class LayerReader:
    """Reads from `source`. When its files are copies of those that it describes, `renew` makes it anew."""

    def __init__(self, source: LayerSource, renew: Callable[[], LayerSource]) -> None:
        self.spec = source.spec
        self._source, self._renew = source, renew

    def nbytes(self, shard: ExpertShard | None) -> int:
        """Bytes of the shard, or of the shared expert."""
        return self._source.shared_nbytes() if shard is None else self._source.nbytes(shard)

    def read(self, shard: ExpertShard | None) -> Expert:
        """The shard, or the shared expert. Raises CheckpointChanged when the files hold something else, and CheckpointError."""
        try:
            return self._read(shard)
        except CheckpointChanged:
            raise
        except CheckpointError:
            self._source = self._renew()
            return self._read(shard)

    def _read(self, shard: ExpertShard | None) -> Expert:
        return next(iter(load_experts(self._source, [shard])))
