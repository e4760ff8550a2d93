"""ColossalAI's MoE layer: its parameters, and its classes."""

from moeserve.compat.colossalai.table import COLOSSALAI

__all__ = ["COLOSSALAI"]
