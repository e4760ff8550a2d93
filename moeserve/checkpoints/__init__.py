"""Files (or a seed) -> weights, lazily and only the slices asked for."""

from moeserve.checkpoints.resolve import layer_sources
from moeserve.checkpoints.source import LayerSource, bank_bytes, load_bank

__all__ = ["LayerSource", "bank_bytes", "layer_sources", "load_bank"]
