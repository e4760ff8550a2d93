"""Below torch's operators: the compiled grouped pass, memory for its weights, and timing to choose a kernel."""

from moeserve.kernels.decode import CodedTile, can_decode, decode, multiply
from moeserve.kernels.linear import InvariantLinear
from moeserve.kernels.memory import WeightArena, WeightArenas, aligned, arena_bytes, scratch
from moeserve.kernels.native import KERNELS, Bank, PassWork, find_kernel, library
from moeserve.kernels.panels import TYPES, bias_from_panels, bias_to_panels, from_panels, padded, to_panels
from moeserve.kernels.stopwatch import fastest_of

__all__ = [
    "KERNELS",
    "TYPES",
    "Bank",
    "CodedTile",
    "InvariantLinear",
    "PassWork",
    "WeightArena",
    "WeightArenas",
    "aligned",
    "arena_bytes",
    "bias_from_panels",
    "bias_to_panels",
    "can_decode",
    "decode",
    "fastest_of",
    "find_kernel",
    "from_panels",
    "library",
    "multiply",
    "padded",
    "scratch",
    "to_panels",
]
