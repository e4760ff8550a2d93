"""Layers to be placed, of which nothing counts but how many experts they have."""

from __future__ import annotations

from hypothesis import strategies as st

from moeserve.config import GatingConfig, LayerSpec

STRATEGIES = st.sampled_from(["contiguous", "round_robin"])


def spec_of(num_experts: int) -> LayerSpec:
    return LayerSpec(f"layer of {num_experts}", 4, 4, num_experts, "swiglu", False, "float32", GatingConfig())
