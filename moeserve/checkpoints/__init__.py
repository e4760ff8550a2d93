"""Files (or a seed) -> weights, lazily and only the slices asked for."""

from moeserve.checkpoints.resolve import layer_sources
from moeserve.checkpoints.source import LayerSource, bank_bytes, load_bank, load_experts
from moeserve.checkpoints.swapped import Swap, swapped_layers

__all__ = ["LayerSource", "Swap", "bank_bytes", "layer_sources", "load_bank", "load_experts", "swapped_layers"]
