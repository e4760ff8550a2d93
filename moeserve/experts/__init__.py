"""The experts one host holds of one layer, and the grouped pass over them; torch only."""

from moeserve.experts.activations import is_gated
from moeserve.experts.bank import BankForm, ExpertBank, GroupOf, Integers, LayerBank, grouped
from moeserve.experts.choice import Choice, Shape, measured
from moeserve.experts.codes import INT4, INT8, Code, float_code
from moeserve.experts.expert import Expert, ExpertShard
from moeserve.experts.feed_forward import ROWS, FeedForward, feed_forward_bytes
from moeserve.experts.held import HeldExpert
from moeserve.experts.module import ModuleExpert, check_module, make_module, module_bytes, module_class
from moeserve.experts.placer import Placer
from moeserve.experts.quantized import QuantizedFeedForward, computed_in, quantize
from moeserve.experts.quantized_matrix import QuantizedMatrix
from moeserve.experts.scale_groups import ScaleGroups

__all__ = [
    "INT4",
    "INT8",
    "ROWS",
    "BankForm",
    "Choice",
    "Code",
    "Expert",
    "ExpertBank",
    "ExpertShard",
    "FeedForward",
    "GroupOf",
    "HeldExpert",
    "Integers",
    "LayerBank",
    "ModuleExpert",
    "Placer",
    "QuantizedFeedForward",
    "QuantizedMatrix",
    "ScaleGroups",
    "Shape",
    "check_module",
    "computed_in",
    "feed_forward_bytes",
    "float_code",
    "grouped",
    "is_gated",
    "make_module",
    "measured",
    "module_bytes",
    "module_class",
    "quantize",
]
