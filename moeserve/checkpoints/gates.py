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
    """Renormalized, unless `moe_normalize_expert_weights` is null; its one other value is the power 1."""
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


def axk2(config: Config) -> Knobs:
    """A.X-K2; its groups leave experts outside of them in play, at a score of 0, which no gate here does."""
    if config.get("n_group") not in (1, None):
        raise ValueError(f"n_group is {shown(config['n_group'])}; supported: 1 or null")
    return deepseek_v3(routed_scaling_factor=2.5)(config)


def caller(config: Config) -> Knobs:
    """Nothing: what the gate looks at is not what the experts get, or nobody but the model knows it."""
    return {"routing": "caller"}


def cohere2(config: Config) -> Knobs:
    """The largest logits, through a softmax or each through a sigmoid."""
    if one_of(config, "expert_selection_fn", ("softmax", "sigmoid"), "softmax") == "softmax":
        return chosen_logits(config)
    return {"scoring_func": "sigmoid", "renormalize": _renormalize(config, True)}


def deepseek_v4(config: Config) -> Knobs:
    """No groups any more; `of_layer` in rules.py says which layers look their experts up."""
    scores = {"sqrtsoftplus": "sqrt_softplus", "sigmoid": "sigmoid", "softmax": "softmax"}
    return {
        "scoring_func": scores[one_of(config, "scoring_func", tuple(scores), "sqrtsoftplus")],
        "routing": "token_table" if config["is_hash_layer"] else "learned",
        "renormalize": "pre_drop",
        "routed_scaling_factor": number(config, "routed_scaling_factor", 1.5),
    }


def bailing(config: Config) -> Knobs:
    """Ling: the first models have a softmax, the second ones a sigmoid with groups. A single choice would keep its score."""
    whole(config, "num_experts_per_tok", at_least=2)
    if one_of(config, "score_function", ("softmax", "sigmoid"), "softmax") == "sigmoid":
        return deepseek_v3()(config)
    return renormalized_if_told(False)(config)


def flint(config: Config) -> Knobs:
    """Sigmoid scores, renormalized unless `norm_topk_prob` is false."""
    return {"scoring_func": "sigmoid", "renormalize": _renormalize(config, True)}


def hy_v3(config: Config) -> Knobs:
    """Sigmoid scores, renormalized and scaled."""
    return {"scoring_func": "sigmoid", "renormalize": "pre_drop", "routed_scaling_factor": number(config, "router_scaling_factor", 2.826)}


def kolibri(config: Config) -> Knobs:
    """Its selection bias is added to the logits."""
    return {"scoring_func": "sigmoid", "rank_by": "logits", "renormalize": _renormalize(config, False)}


def laguna(config: Config) -> Knobs:
    """Sigmoid scores of softly capped logits, renormalized and scaled."""
    cap = number(config, "moe_router_logit_softcapping", 0.0, may_be_zero=True)
    return {
        "scoring_func": "sigmoid",
        "renormalize": "pre_drop",
        "routed_scaling_factor": number(config, "moe_routed_scaling_factor", 1.0),
        **({"logit_softcap": cap} if cap else {}),
    }


def minimax_m3(config: Config) -> Knobs:
    """That of MiniMax-M2, scaled."""
    return {**minimax_m2(config), "routed_scaling_factor": number(config, "routed_scaling_factor", 2.0)}


def nemotron(config: Config) -> Knobs:
    """Experts of a latent size take a projection of the token, and its gate the token itself."""
    return caller(config) if config.get("moe_latent_size") is not None else deepseek_v3()(config)


def step(config: Config) -> Knobs:
    """That of MiniMax-M2, scaled by a key of its own."""
    return {**minimax_m2(config), "routed_scaling_factor": number(config, "moe_router_scaling_factor", 1.0)}


def mimo(config: Config) -> Knobs:
    """As published, its scaling factor is null."""
    return deepseek_v3()({**config, "routed_scaling_factor": 1.0} if config.get("routed_scaling_factor") is None else config)


def mistral4(config: Config) -> Knobs:
    """Softmax, the best groups by their two best experts."""
    return {**mistral_large4(config), "renormalize": _renormalize(config, True)}


def mistral_large4(config: Config) -> Knobs:
    """Softmax, the best groups by their two best experts; renormalized and scaled."""
    return {
        **_groups(config, "top2_sum"),
        "renormalize": "pre_drop",
        "routed_scaling_factor": number(config, "routed_scaling_factor", 1.0),
    }


def minimax_m2(config: Config) -> Knobs:
    """Sigmoid scores, renormalized."""
    return {"scoring_func": "sigmoid", "renormalize": "pre_drop"}


def afmoe(config: Config) -> Knobs:
    """Sigmoid scores, renormalized and scaled by `route_scale`."""
    return {"scoring_func": "sigmoid", "renormalize": "pre_drop", "routed_scaling_factor": number(config, "route_scale", 1.0)}


def lfm2(config: Config) -> Knobs:
    """Sigmoid scores, scaled, and renormalized with an epsilon of 1e-6 unless `norm_topk_prob` is false."""
    renormalize = {"renormalize": "pre_drop", "renormalize_eps": 1e-6} if flag(config, "norm_topk_prob", True) else {}
    return {"scoring_func": "sigmoid", "routed_scaling_factor": number(config, "routed_scaling_factor", 1.0), **renormalize}


def longcat(config: Config) -> Knobs:
    """Softmax, scaled."""
    return {"routed_scaling_factor": number(config, "routed_scaling_factor", 6.0)}


def llama4(config: Config) -> Knobs:
    """Sigmoid scores, which scale what the experts get instead of what they answer."""
    return {"scoring_func": "sigmoid", "scale_inputs": True}


def phimoe(config: Config) -> Knobs:
    """SparseMixer, which chooses two experts."""
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
