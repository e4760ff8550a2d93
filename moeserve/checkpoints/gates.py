"""config.json -> knobs of GatingConfig, the way each family of transformers computes its gate. Defaults are those of transformers.

Functions raise ValueError with one sentence for a setting that no gate here computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from moeserve.checkpoints.keys import Config, flag, has, lookup, must_be, number, one_of, shown, whole

Knobs = Mapping[str, Any]


def plain(config: Config) -> Knobs:
    """Probabilities as they are: Jamba."""
    return {}


def renormalized(config: Config) -> Knobs:
    """Mixtral, MiniMax, Hunyuan."""
    return {"renormalize": "pre_drop"}


def ernie(config: Config) -> Knobs:
    """The sum that the chosen scores are divided by has a floor, which must be one that no sum touches."""
    if number(config, "moe_norm_min", 1e-12, may_be_zero=True) > 1e-6:
        raise must_be(config, "moe_norm_min", "at most 1e-06")
    return renormalized(config)


def chosen_logits(config: Config) -> Knobs:
    """A softmax over the chosen logits alone: gpt-oss, Granite."""
    return {"scoring_func": "softmax_topk"}


def renormalized_if_told(default: bool) -> Callable[[Config], Knobs]:
    """Qwen, OLMoE: `norm_topk_prob`."""

    def knobs(config: Config) -> Knobs:
        return {"renormalize": _renormalize(config, default)}

    return knobs


def dbrx(config: Config) -> Knobs:
    key = "ffn_config.moe_normalize_expert_weights"
    power = lookup(config, key)
    if power is not None and not (type(power) in (int, float) and power == 1):
        raise ValueError(f"{key} is {shown(power)}; supported: 1 or null")
    return {"renormalize": "none" if power is None and has(config, key) else "pre_drop"}


def deepseek_v2(config: Config) -> Knobs:
    """Softmax, the best groups by their best expert. norm_topk_prob is not read, as in transformers."""
    method = one_of(config, "topk_method", ("greedy", "group_limited_greedy"), "greedy")
    groups = _groups(config, "max") if method == "group_limited_greedy" else {}
    return {**groups, "routed_scaling_factor": number(config, "routed_scaling_factor", 1.0)}


def deepseek_v3(*, norm_topk_prob: bool = True, routed_scaling_factor: float = 1.0) -> Callable[[Config], Knobs]:
    """Sigmoid, a bias for selection, the best groups by their two best experts: DeepSeek-V3 and those after it. The defaults differ."""

    def knobs(config: Config) -> Knobs:
        return {
            "scoring_func": "sigmoid",
            **_groups(config, "top2_sum"),
            "renormalize": _renormalize(config, norm_topk_prob),
            "routed_scaling_factor": number(config, "routed_scaling_factor", routed_scaling_factor),
        }

    return knobs


def minimax_m2(config: Config) -> Knobs:
    return {"scoring_func": "sigmoid", "renormalize": "pre_drop"}


def afmoe(config: Config) -> Knobs:
    return {"scoring_func": "sigmoid", "renormalize": "pre_drop", "routed_scaling_factor": number(config, "route_scale", 1.0)}


def lfm2(config: Config) -> Knobs:
    renormalize = {"renormalize": "pre_drop", "renormalize_eps": 1e-6} if flag(config, "norm_topk_prob", True) else {}
    return {"scoring_func": "sigmoid", "routed_scaling_factor": number(config, "routed_scaling_factor", 1.0), **renormalize}


def longcat(config: Config) -> Knobs:
    return {"routed_scaling_factor": number(config, "routed_scaling_factor", 6.0)}


def llama4(config: Config) -> Knobs:
    return {"scoring_func": "sigmoid", "scale_inputs": True}


def phimoe(config: Config) -> Knobs:
    if config.get("num_experts_per_tok") != 2:
        raise must_be(config, "num_experts_per_tok", "2, as many as SparseMixer chooses")
    return {"routing": "sparsemixer", "sparsemixer_eps": number(config, "router_jitter_noise", 0.01, may_be_zero=True)}


def _renormalize(config: Config, default: bool) -> str:
    return "pre_drop" if flag(config, "norm_topk_prob", default) else "none"


def _groups(config: Config, score: str) -> Knobs:
    """Without `n_group`, or with null, there are none, whatever transformers' default is; one group is no limit at all."""
    count = 1 if config.get("n_group") is None else whole(config, "n_group")
    best = 1 if count == 1 and config.get("topk_group") is None else whole(config, "topk_group")
    if best > count:
        raise must_be(config, "topk_group", f"at most n_group = {shown(config.get('n_group'))}")
    return {} if count == 1 else {"num_expert_groups": count, "topk_groups": best, "group_score": score}
