"""config.json -> which layers are MoE layers, how large a shared expert is, what stands between the projections.

Defaults are those of transformers. Functions raise ValueError with one sentence for what cannot be served.
"""

from __future__ import annotations

from collections.abc import Callable

from moeserve.checkpoints.family import Config, lookup
from moeserve.config import Activation


def sparse_step(config: Config, index: int) -> bool:
    return index not in (config.get("mlp_only_layers") or ()) and (index + 1) % config.get("decoder_sparse_step", 1) == 0


def after_dense(default: int, key: str = "first_k_dense_replace") -> Callable[[Config, int], bool]:
    """The first layers are dense."""

    def is_moe_layer(config: Config, index: int) -> bool:
        return bool(index >= config.get(key, default))

    return is_moe_layer


def of_kind(default: int) -> Callable[[Config, int], bool]:
    """`mlp_layer_types` names the kind of every layer; without it the first layers are dense."""

    def is_moe_layer(config: Config, index: int) -> bool:
        kinds = config.get("mlp_layer_types")
        return bool(kinds[index] == "sparse") if kinds else after_dense(default)(config, index)

    return is_moe_layer


def every_nth(config: Config, index: int) -> bool:
    """Llama 4."""
    step = config.get("interleave_moe_layer_step", 1)
    return index in config["moe_layers"] if config.get("moe_layers") is not None else bool((index + 1) % step == 0)


def ernie(config: Config, index: int) -> bool:
    end = config.get("moe_layer_end_index", -1)
    is_within = index >= config.get("moe_layer_start_index", 1) and (end == -1 or index <= end)
    return bool(is_within and (index + 1) % config.get("moe_layer_interval", 1) == 0)


def jamba(config: Config, index: int) -> bool:
    return bool(index % config.get("expert_layer_period", 2) == config.get("expert_layer_offset", 1))


def times_expert(key: str, default: int) -> Callable[[Config], int]:
    """A shared expert as large as so many others."""

    def size(config: Config) -> int:
        return int(config["moe_intermediate_size"] * (config.get(key, default) or 0))

    return size


def of_its_own(config: Config) -> int:
    return int(config["shared_expert_intermediate_size"])


def like_the_others(config: Config) -> int:
    return int(config["intermediate_size"])


def gpt_oss_activation(config: Config) -> Activation:
    for key, value in (("swiglu_alpha", 1.702), ("swiglu_limit", 7.0)):
        if config.get(key, value) != value:
            raise ValueError(f"{key} is {config[key]}; supported: {value}")
    return "swigluoai"


def dbrx_activation(config: Config) -> Activation:
    function = lookup(config, "ffn_config.ffn_act_fn") or {"name": "silu"}
    if function != {"name": "silu"}:
        raise ValueError(f"ffn_config.ffn_act_fn is {function}; supported: {{'name': 'silu'}}")
    return "swiglu"
