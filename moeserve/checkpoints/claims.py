"""Keys of config.json that say how a layer is computed, in any family, compared with our computation.

A family reads the keys that its class in transformers reads. The same words in another model's config.json would change nothing, and a
model under a wrong `model_type` would be served with a gate that is not its own. So each key below is compared with the layer that
came out: saying what the layer does is harmless, saying something else is an error. null says nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from moeserve.checkpoints.family import ACTIVATIONS, Family
from moeserve.checkpoints.huggingface import HuggingFaceLayer
from moeserve.checkpoints.keys import Config, flag, shown
from moeserve.config import LIMITED, Activation, parsed_activation

_SCORING: Final = {"softmax_topk": "softmax", "sqrt_softplus": "sqrtsoftplus"}


@dataclass(frozen=True)
class Claim:
    """Keys that mean the same, and which values agree with a layer. A list has a value for every layer of the model."""

    keys: tuple[str, ...]
    agreeing: Callable[[HuggingFaceLayer], Sequence[Any]]
    #: a key and the value with which the others say nothing
    unless: tuple[str, Any] = ("", None)
    #: whether it is about the gate or a shared expert, which callers may keep
    is_of_gate: bool = True


def _scoring(layer: HuggingFaceLayer) -> list[str]:
    gating = layer.spec.gating
    is_scored = gating.routing in ("learned", "token_table")
    name = _SCORING.get(gating.scoring_func, gating.scoring_func) if is_scored else gating.routing
    # dots.llm1 is published with the name of its selection there.
    return [name, *(["noaux_tc"] if layer.has_selection_bias else [])]


def _has_bias(layer: HuggingFaceLayer) -> list[bool]:
    """Where a table chooses, it is of no account that the other layers have one."""
    return [True, False] if layer.spec.gating.routing == "token_table" else [layer.has_selection_bias]


def _renormalizes(layer: HuggingFaceLayer) -> list[bool]:
    gating = layer.spec.gating
    return [gating.scoring_func == "softmax_topk" or gating.renormalize != "none"]


def _selection(layer: HuggingFaceLayer) -> list[str]:
    """DeepSeek's names."""
    gating = layer.spec.gating
    if layer.has_selection_bias or gating.routing == "token_table":
        return ["noaux_tc"]
    limited = gating.num_expert_groups is not None
    return [*([] if limited else ["greedy"]), *([] if gating.group_score == "top2_sum" else ["group_limited_greedy"])]


def _is_limited(layer: HuggingFaceLayer) -> list[bool]:
    """One group is no limit, whether it is called one or not."""
    return [True] if layer.spec.gating.num_expert_groups is not None else [True, False]


def _activations(layer: HuggingFaceLayer) -> list[str]:
    name, _ = parsed_activation(layer.spec.activation)
    own = "swiglu" if name in LIMITED else name
    return [name for name, activation in ACTIVATIONS.items() if activation == own] + [name]


def _limit(activation: Activation) -> list[float]:
    """0 is no limit."""
    return [parsed_activation(activation)[1] or 0.0]


def _alpha(layer: HuggingFaceLayer) -> list[float]:
    return [1.702] if parsed_activation(layer.spec.activation)[0] == "swigluoai" else []


def _latent(layer: HuggingFaceLayer) -> list[int]:
    """Experts of a width of their own take what the model projects to it, so the gate is not theirs either."""
    return [] if layer.layout.router else [layer.spec.hidden_size]


def _shared_experts(layer: HuggingFaceLayer) -> list[int]:
    """How many of the others' size the shared one is made of; with a size of its own it is one."""
    count, rest = divmod(layer.shared_size, layer.spec.intermediate_size)
    return [*([] if rest else [count]), *([1] if layer.shared_size else [])]


CLAIMS: Final = (
    Claim(
        (
            "scoring_func",
            "score_func",
            "score_function",
            "router_scoring_func",
            "moe_router_score_function",
            "moe_router_activation",
            "moe_router_activation_func",
            "moe_gate_act",
            "expert_selection_fn",
        ),
        _scoring,
    ),
    Claim(("norm_topk_prob", "route_norm", "moe_renormalize", "norm_expert_weight"), _renormalizes),
    Claim(
        (
            "routed_scaling_factor",
            "route_scale",
            "router_scaling_factor",
            "moe_router_scaling_factor",
            "moe_router_topk_scaling_factor",
            "moe_routed_scaling_factor",
        ),
        lambda layer: [layer.spec.gating.routed_scaling_factor],
    ),
    Claim(("topk_method",), _selection),
    Claim(("use_grouped_topk", "group_limited_greedy"), _is_limited),
    Claim(
        ("n_group", "num_expert_group", "num_expert_groups", "moe_router_num_groups"),
        lambda layer: [layer.spec.gating.num_expert_groups or 1],
        unless=("topk_method", "greedy"),
    ),
    Claim(
        ("topk_group", "topk_groups", "moe_router_group_topk"),
        lambda layer: [layer.spec.gating.topk_groups or 1],
        unless=("topk_method", "greedy"),
    ),
    Claim(
        ("use_routing_bias", "use_expert_bias", "moe_router_enable_expert_bias", "use_moe_router_bias", "moe_use_aux_free"),
        _has_bias,
    ),
    Claim(("router_bias",), lambda layer: [layer.has_router_bias]),
    Claim(("router_logit_softcapping", "moe_router_logit_softcapping"), lambda layer: [layer.spec.gating.logit_softcap or 0.0]),
    Claim(("apply_router_weight_on_input",), lambda layer: [layer.spec.gating.scale_inputs]),
    Claim(
        ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "moe_top_k", "moe_k", "moe_router_topk"),
        lambda layer: [layer.spec.gating.top_k],
        is_of_gate=False,
    ),
    Claim(
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts"),
        lambda layer: [layer.spec.num_hosted_experts],
        is_of_gate=False,
    ),
    Claim(("zero_expert_num",), lambda layer: [layer.spec.identity_experts]),
    Claim(("zero_expert_type",), lambda layer: ["identity"]),
    Claim(("hidden_act", "hidden_activation", "mlp_hidden_act"), _activations, is_of_gate=False),
    Claim(("swiglu_limit", "swiglu_limits"), lambda layer: _limit(layer.spec.activation), is_of_gate=False),
    Claim(("swiglu_limits_shared",), lambda layer: _limit(layer.shared_activation or layer.spec.activation)),
    Claim(("swiglu_alpha",), _alpha, is_of_gate=False),
    Claim(("n_shared_experts", "num_shared_experts", "num_shared_expert", "moe_num_shared_experts"), _shared_experts),
    Claim(
        ("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", "share_expert_dim", "shared_intermediate_size"),
        lambda layer: [layer.shared_size],
    ),
    Claim(("moe_latent_size", "moe_hidden_size"), _latent, is_of_gate=False),
)


def check_claims(config: Config, layer: HuggingFaceLayer, family: Family, model_type: str) -> None:
    """Raises ValueError naming the first key that says something else than `layer` does."""
    for claim in CLAIMS:
        key, value = claim.unless
        is_silent = value is not None and config.get(key) == value
        if is_silent or (claim.is_of_gate and not layer.layout.router):
            continue
        agreeing = claim.agreeing(layer)
        said = {key: _of_layer(config.get(key), layer.index) for key in claim.keys if key not in family.unrelated}
        agrees = {key: any(_same(value, other) for other in agreeing) for key, value in said.items() if value is not None}
        wrong = next((key for key, is_right in agrees.items() if not is_right), None)
        if wrong is not None:
            right = next((f"{key} is {shown(said[key])}" for key, is_right in agrees.items() if is_right), _having(agreeing, model_type))
            raise ValueError(f"{wrong} is {shown(said[wrong])}, but {right}")
    if layer.shared_size and family.shared_bias and flag(config, family.shared_bias, layer.shared_bias) != layer.shared_bias:
        raise ValueError(f"{family.shared_bias} is {shown(config[family.shared_bias])}, but {_having([layer.shared_bias], model_type)}")


def _having(agreeing: Sequence[Any], model_type: str) -> str:
    return f"a {model_type} model with the tensors of this folder has {' or '.join(map(shown, agreeing)) or 'no such thing'}"


def _of_layer(said: Any, index: int) -> Any:
    return said[index] if isinstance(said, list) and index < len(said) else said


def _same(said: Any, value: Any) -> bool:
    """true is not 1, but 1 is 1.0."""
    return said == value and isinstance(said, bool) == isinstance(value, bool)
