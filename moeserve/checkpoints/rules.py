"""config.json -> which layers are MoE layers, how large a shared expert is, what stands between the projections.

Defaults are those of transformers. Functions raise ValueError with one sentence for what cannot be served.
"""

from __future__ import annotations

from collections.abc import Callable

from moeserve.checkpoints.keys import Config, indexes, kinds, lookup, shown, whole
from moeserve.config import Activation


def sparse_step(config: Config, index: int) -> bool:
    return index not in (indexes(config, "mlp_only_layers") or ()) and (index + 1) % whole(config, "decoder_sparse_step", 1) == 0


def after_dense(default: int, key: str = "first_k_dense_replace") -> Callable[[Config, int], bool]:
    """The first layers are dense."""

    def is_moe_layer(config: Config, index: int) -> bool:
        return index >= whole(config, key, default, at_least=0)

    return is_moe_layer


def of_kind(default: int) -> Callable[[Config, int], bool]:
    """`mlp_layer_types` names the kind of every layer; without it the first layers are dense."""

    def is_moe_layer(config: Config, index: int) -> bool:
        named = kinds(config, "mlp_layer_types", ("dense", "sparse"))
        return named[index] == "sparse" if named else after_dense(default)(config, index)

    return is_moe_layer


def every_nth(config: Config, index: int) -> bool:
    """Llama 4."""
    named = indexes(config, "moe_layers")
    return index in named if named is not None else (index + 1) % whole(config, "interleave_moe_layer_step", 1) == 0


def ernie(config: Config, index: int) -> bool:
    start, end = whole(config, "moe_layer_start_index", 1, at_least=0), whole(config, "moe_layer_end_index", -1, at_least=-1)
    is_within = index >= start and (end == -1 or index <= end)
    return is_within and (index + 1) % whole(config, "moe_layer_interval", 1) == 0


def jamba(config: Config, index: int) -> bool:
    """One expert is a dense layer."""
    period, offset = whole(config, "expert_layer_period", 2), whole(config, "expert_layer_offset", 1, at_least=0)
    return index % period == offset and lookup(config, "num_experts") != 1


def times_expert(key: str, default: int) -> Callable[[Config], int]:
    """A shared expert as large as so many others; null = there is none."""

    def size(config: Config) -> int:
        is_null = key in config and config[key] is None
        return 0 if is_null else whole(config, "moe_intermediate_size") * whole(config, key, default, at_least=0)

    return size


def of_its_own(config: Config) -> int:
    return whole(config, "shared_expert_intermediate_size", at_least=0)


def like_the_others(config: Config) -> int:
    return whole(config, "intermediate_size")


def gpt_oss_activation(config: Config) -> Activation:
    for key, value in (("swiglu_alpha", 1.702), ("swiglu_limit", 7.0)):
        if config.get(key, value) != value:
            raise ValueError(f"{key} is {shown(config[key])}; supported: {value}")
    return "swigluoai"


def dbrx_activation(config: Config) -> Activation:
    function = lookup(config, "ffn_config.ffn_act_fn") or {"name": "silu"}
    if function != {"name": "silu"}:
        raise ValueError(f'ffn_config.ffn_act_fn is {shown(function)}; supported: {{"name": "silu"}}')
    return "swiglu"
