"""A layer as the keys of [[layers]] describe it -> its spec."""

from __future__ import annotations

from moeserve.api.tensors import FLOAT_DTYPES
from moeserve.config import Dtype, LayerConfig, LayerSpec, Quantization
from moeserve.experts import ExpertShard, check_module, feed_forward_bytes


def spec_of(name: str, layer: LayerConfig, dtype: Dtype, quantization: Quantization | None = None) -> LayerSpec:
    """Raises ConfigError when a module cannot be imported, made, or does not keep the shape of its rows."""
    assert layer.hidden_size and layer.num_experts, "checked before"
    args = layer.expert_args if isinstance(layer.expert_args, tuple) else (layer.expert_args,) * num_hosted_experts(layer)
    if layer.expert is not None:
        for each in args if isinstance(layer.expert_args, tuple) else args[:1]:
            check_module(layer.expert, each, layer.hidden_size)
    if layer.shared_expert is not None and layer.shared_expert.expert is not None:
        check_module(layer.shared_expert.expert, layer.shared_expert.expert_args, layer.hidden_size)
    return LayerSpec(
        name=name,
        hidden_size=layer.hidden_size,
        intermediate_size=max(intermediate_sizes(layer)),
        num_experts=layer.num_experts,
        activation=layer.activation,
        bias=layer.bias,
        dtype=dtype,
        gating=layer.gating,
        module=layer.expert,
        module_args=args if layer.expert is not None else (),
        identity_experts=layer.identity_experts,
        zero_experts=layer.zero_experts,
        shared_mixing=None if layer.shared_expert is None else layer.shared_expert.mixing,
        shared_module=None if layer.shared_expert is None else layer.shared_expert.expert,
        quantization=quantization,
    )


def num_hosted_experts(layer: LayerConfig) -> int:
    """Those that compute."""
    return (layer.num_experts or 0) - layer.identity_experts - layer.zero_experts


def expert_bytes(spec: LayerSpec, intermediate_size: int, shard: ExpertShard, bias: bool | None = None) -> int:
    """Bytes of a shard of a feed-forward expert of this layer, as a host holds it; bias = None: as the layer has it."""
    bias, dtype = spec.bias if bias is None else bias, FLOAT_DTYPES[spec.dtype]
    return feed_forward_bytes(spec.hidden_size, intermediate_size, spec.activation, bias, dtype, shard, spec.quantized_to)


def intermediate_sizes(layer: LayerConfig) -> tuple[int, ...]:
    """I of each expert that computes; 0 for modules."""
    sizes = layer.intermediate_size
    return sizes if isinstance(sizes, tuple) else (sizes or 0,) * num_hosted_experts(layer)
