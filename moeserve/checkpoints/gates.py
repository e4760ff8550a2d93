"""config.json -> knobs of GatingConfig, the way each family of transformers computes its gate. Defaults are those of transformers.

Functions raise ValueError with one sentence for a setting that no gate here computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from moeserve.checkpoints.family import Config, lookup

Knobs = Mapping[str, Any]


def plain(config: Config) -> Knobs:
    """Probabilities as they are: Jamba."""
    return {}


def renormalized(config: Config) -> Knobs:
    """Mixtral, MiniMax, Hunyuan, Ernie 4.5."""
    return {"renormalize": "pre_drop"}


def chosen_logits(config: Config) -> Knobs:
    """A softmax over the chosen logits alone: gpt-oss, Granite."""
    return {"scoring_func": "softmax_topk"}


def renormalized_if_told(default: bool) -> Callable[[Config], Knobs]:
    """Qwen, OLMoE: `norm_topk_prob`."""

    def knobs(config: Config) -> Knobs:
        return {"renormalize": "pre_drop" if config.get("norm_topk_prob", default) else "none"}

    return knobs


def dbrx(config: Config) -> Knobs:
    power = lookup(config, "ffn_config.moe_normalize_expert_weights")
    if power not in (1, None):
        raise ValueError(f"ffn_config.moe_normalize_expert_weights is {power}; supported: 1 or null")
    has_key = "moe_normalize_expert_weights" in config.get("ffn_config", {})
    return {"renormalize": "none" if power is None and has_key else "pre_drop"}


def deepseek_v2(config: Config) -> Knobs:
    """Softmax, the best groups by their best expert. norm_topk_prob is not read, as in transformers."""
    method = config.get("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise ValueError(f"topk_method {method!r} is not one of greedy, group_limited_greedy")
    groups = _groups(config.get("n_group"), config.get("topk_group"), "max") if method == "group_limited_greedy" else {}
    return {**groups, "routed_scaling_factor": config.get("routed_scaling_factor", 1.0)}


def deepseek_v3(
    *, norm_topk_prob: bool = True, routed_scaling_factor: float = 1.0, n_group: int = 1, topk_group: int = 1
) -> Callable[[Config], Knobs]:
    """Sigmoid, a bias for selection, the best groups by their two best experts: DeepSeek-V3 and those after it. The defaults differ."""

    def knobs(config: Config) -> Knobs:
        return {
            "scoring_func": "sigmoid",
            **_groups(config.get("n_group", n_group), config.get("topk_group", topk_group), "top2_sum"),
            "renormalize": "pre_drop" if config.get("norm_topk_prob", norm_topk_prob) else "none",
            "routed_scaling_factor": config.get("routed_scaling_factor", routed_scaling_factor),
        }

    return knobs


def minimax_m2(config: Config) -> Knobs:
    return {"scoring_func": "sigmoid", "renormalize": "pre_drop"}


def afmoe(config: Config) -> Knobs:
    return {"scoring_func": "sigmoid", "renormalize": "pre_drop", "routed_scaling_factor": config.get("route_scale", 1.0)}


def lfm2(config: Config) -> Knobs:
    if not config.get("use_expert_bias", True):
        raise ValueError("use_expert_bias is false; supported: true")
    renormalize = {"renormalize": "pre_drop", "renormalize_eps": 1e-6} if config.get("norm_topk_prob", True) else {}
    return {"scoring_func": "sigmoid", "routed_scaling_factor": config.get("routed_scaling_factor", 1.0), **renormalize}


def longcat(config: Config) -> Knobs:
    return {"routed_scaling_factor": config.get("routed_scaling_factor", 6.0)}


def llama4(config: Config) -> Knobs:
    return {"scoring_func": "sigmoid", "scale_inputs": True}


def phimoe(config: Config) -> Knobs:
    return {"routing": "sparsemixer", "sparsemixer_eps": config.get("router_jitter_noise", 0.01)}


def _groups(count: Any, best: Any, score: str) -> Knobs:
    # One group is no limit at all.
    return {} if count in (1, None) else {"num_expert_groups": count, "topk_groups": best, "group_score": score}
