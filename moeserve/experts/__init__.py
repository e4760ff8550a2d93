"""The experts one host holds of one layer, and the grouped pass over them; torch only."""

from moeserve.experts.activations import is_gated
from moeserve.experts.bank import ExpertBank
from moeserve.experts.choice import Choice, Shape, measured
from moeserve.experts.expert import Expert, ExpertShard
from moeserve.experts.feed_forward import ROWS, FeedForward, feed_forward_bytes
from moeserve.experts.module import ModuleExpert, check_module, make_module, module_bytes, module_class
from moeserve.experts.quantized import QuantizedFeedForward, QuantizedMatrix, quantize

__all__ = [
    "ROWS",
    "Choice",
    "Expert",
    "ExpertBank",
    "ExpertShard",
    "FeedForward",
    "ModuleExpert",
    "QuantizedFeedForward",
    "QuantizedMatrix",
    "Shape",
    "check_module",
    "feed_forward_bytes",
    "is_gated",
    "make_module",
    "measured",
    "module_bytes",
    "module_class",
    "quantize",
]
