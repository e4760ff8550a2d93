"""A layer in front of its experts: gate, dispatch and combine; and the same layer whole, in one process."""

from moeserve.layer.moe_layer import MoELayer

__all__ = ["MoELayer"]
