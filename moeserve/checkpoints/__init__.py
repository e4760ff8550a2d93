"""Files (or a seed) -> weights, lazily and only the slices asked for."""

from moeserve.checkpoints.family import Family, Layout
from moeserve.checkpoints.fingerprint import FileMark, Fingerprint, fingerprint_of
from moeserve.checkpoints.layouts import ExpertLayout, Flat, Separate, Stacked
from moeserve.checkpoints.memory import check_change, check_memory, host_bytes, in_memory, layer_size, memory_bytes, memory_warning
from moeserve.checkpoints.memory_group import MemoryGroup
from moeserve.checkpoints.resolve import layer_sources
from moeserve.checkpoints.saving import SavedLayer, prefixed, save, saved_experts
from moeserve.checkpoints.source import LayerSource, bank_bytes, bank_form, load_bank, load_experts, make_bank
from moeserve.checkpoints.swapped import ReleasedLayer, ServedLayers, Swap, compacted, layer_fingerprints

__all__ = [
    "ExpertLayout",
    "Family",
    "FileMark",
    "Fingerprint",
    "Flat",
    "LayerSource",
    "Layout",
    "MemoryGroup",
    "ReleasedLayer",
    "SavedLayer",
    "Separate",
    "ServedLayers",
    "Stacked",
    "Swap",
    "bank_bytes",
    "bank_form",
    "check_change",
    "check_memory",
    "compacted",
    "fingerprint_of",
    "host_bytes",
    "in_memory",
    "layer_fingerprints",
    "layer_size",
    "layer_sources",
    "load_bank",
    "load_experts",
    "make_bank",
    "memory_bytes",
    "memory_warning",
    "prefixed",
    "save",
    "saved_experts",
]
