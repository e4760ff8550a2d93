"""A layer without its experts: gate, dispatch and combine; and the whole layer in one process."""

from moeserve.layer.moe_layer import MoELayer

__all__ = ["MoELayer"]
