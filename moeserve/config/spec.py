"""A served MoE layer, with all defaults resolved: hosts, frontends and clients agree on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moeserve.config.activation import Activation
from moeserve.config.gating import GatingConfig
from moeserve.config.values import Bits, Dtype, Kernel, Mixing, Quantization


@dataclass(frozen=True)
class LayerSpec:
    """Sizes and rules of one layer: H hidden_size, I intermediate_size, E num_experts.

    dtype is that of the expert weights and of their computations, unless they are quantized or published in few bits.
    intermediate_size is that of the largest expert, 0 for a module; `module` is the import path of a module that is the expert,
    module_args what each of the hosted experts is made with.
    Of the num_experts the last do not compute: first identity_experts that answer the token itself, then zero_experts.
    shared_mixing: how the answer of a shared expert is added, None = there is none; shared_module: its import path if it is a module.
    """

    name: str
    hidden_size: int
    intermediate_size: int
    num_experts: int
    activation: Activation
    bias: bool
    dtype: Dtype
    gating: GatingConfig
    module: str | None = None
    module_args: Sequence[Mapping[str, Any]] = ()
    identity_experts: int = 0
    zero_experts: int = 0
    shared_mixing: Mixing | None = None
    shared_module: str | None = None
    quantization: Quantization | None = None
    kernel: Kernel = "auto"
    deterministic: bool = False

    @property
    def quantized_to(self) -> Bits | None:
        """The quantization of weights, unless they are stored so."""
        return None if self.quantization == "none" else self.quantization

    @property
    def num_hosted_experts(self) -> int:
        """The number of experts with weights, on hosts: they come first."""
        return self.num_experts - self.identity_experts - self.zero_experts

    @property
    def expert_kind(self) -> str:
        """The activation, or the path of the module."""
        return self.module or self.activation
