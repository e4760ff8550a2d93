"""Files (or a seed) -> weights, lazily and only the slices asked for."""

from moeserve.checkpoints.resolve import layer_sources
from moeserve.checkpoints.source import LayerSource

__all__ = ["LayerSource", "layer_sources"]
