"""DeepSpeed's MoE layer: its parameters, and the layer itself."""

from moeserve.compat.deepspeed.moe import MoE
from moeserve.compat.deepspeed.table import DEEPSPEED

__all__ = ["DEEPSPEED", "MoE"]
