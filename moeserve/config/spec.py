"""A served MoE layer with every open question answered: what hosts, frontends and clients agree on."""

from __future__ import annotations

from dataclasses import dataclass

from moeserve.config.gating import GatingConfig
from moeserve.config.service import Activation, Dtype


@dataclass(frozen=True)
class LayerSpec:
    """Sizes and rules of one layer: H hidden_size, I intermediate_size, E num_experts; dtype is that of the expert weights."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_experts: int
    activation: Activation
    bias: bool
    dtype: Dtype
    gating: GatingConfig
