"""Below torch's operators: the compiled grouped pass, memory for its weights, and timing to choose a kernel."""

from moeserve.kernels.decode import CodedTile, can_decode, decode, multiply
from moeserve.kernels.dispatch import Dispatched, Places, dispatch_pairs, pairs_of, write_message
from moeserve.kernels.linear import InvariantLinear
from moeserve.kernels.memory import WeightArena, WeightArenas, aligned, arena_bytes, scratch
from moeserve.kernels.native import KERNELS, Bank, PassPairs, PassWork, find_kernel, library
from moeserve.kernels.panels import TYPES, bias_from_panels, bias_to_panels, from_panels, padded, to_panels
from moeserve.kernels.route import TopK, normalize, route_top_k, select_top_k
from moeserve.kernels.rows import add_answers, all_finite
from moeserve.kernels.stopwatch import TimeLimit, fastest_of

__all__ = [
    "KERNELS",
    "TYPES",
    "Bank",
    "CodedTile",
    "Dispatched",
    "InvariantLinear",
    "PassPairs",
    "PassWork",
    "Places",
    "TimeLimit",
    "TopK",
    "WeightArena",
    "WeightArenas",
    "add_answers",
    "aligned",
    "all_finite",
    "arena_bytes",
    "bias_from_panels",
    "bias_to_panels",
    "can_decode",
    "decode",
    "dispatch_pairs",
    "fastest_of",
    "find_kernel",
    "from_panels",
    "library",
    "multiply",
    "normalize",
    "padded",
    "pairs_of",
    "route_top_k",
    "scratch",
    "select_top_k",
    "to_panels",
    "write_message",
]
