"""What the fields of TrustformeRS' `ExpertParallelismConfig` mean here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moeserve.compat.table import FLAG, Case, Param, Rule, Values, real, same, whole
from moeserve.compat.trustformers.hosts import EXPERTS, num_hosts
from moeserve.compat.trustformers.structs import ExpertCommunicationPattern, ExpertRoutingStrategy, LoadBalancingStrategy
from moeserve.compat.trustformers.variants import at_most, variant, variant_of

TABLE = EXPERTS
_GATING = "layers.gating"
_BALANCING, _ROUTING, _PATTERN = f"{TABLE}.load_balancing", f"{TABLE}.routing_strategy", f"{TABLE}.communication_pattern"
_DROP = f"{TABLE}.drop_tokens"


def _routing(name: str, **more: Any) -> Any:
    keys = {f"{_GATING}.{key}": value for key, value in {"routing": name, **more}.items()}
    return lambda values: keys


def _by_chance(values: Values) -> Mapping[str, Any]:
    return {f"{_GATING}.routing": "random", f"{_GATING}.seed": values["seed"]}


def _experts_choose(values: Values) -> bool:
    return bool(values[_BALANCING] == "ExpertChoiceBased")


_LOAD_BALANCING = [
    variant(
        "effect",
        _BALANCING,
        "TokenChoiceBased",
        "tokens choose, and `layers.gating.drop_tokens` says whether capacity cuts",
        lambda v: {f"{_GATING}.drop_tokens": v[_DROP]},
    ),
    variant(
        "effect",
        _BALANCING,
        "ExpertChoiceBased",
        "`layers.gating.routing` = `expert_choice`: every expert takes its best max(1, floor(capacity_factor * T / E)) tokens",
        _routing("expert_choice", drop_tokens=True, renormalize="none"),
    ),
    variant("note", _BALANCING, "Dynamic", "not supported: copies of experts do not follow the measured load; answers are the same"),
    variant(
        "effect",
        _BALANCING,
        "RoundRobin",
        "`placement.copy_choice` = `round_robin`: the copies of an expert, dp_size of them, are taken in turn",
        lambda v: {"placement.copy_choice": "round_robin"},
    ),
    variant(
        "effect",
        _BALANCING,
        "LoadAware",
        "`placement.copy_choice` = `least_outstanding`: the copy with the least to do",
        lambda v: {"placement.copy_choice": "least_outstanding"},
    ),
]

_ROUTING_STRATEGY = [
    variant(
        "effect",
        _ROUTING,
        "LearnedGating",
        "`layers.gating.routing` = `learned`, `renormalize` = `pre_drop`: softmax, best top_k",
        _routing("learned", renormalize="pre_drop"),
    ),
    variant("effect", _ROUTING, "HashBased", "`layers.gating.routing` = `hash`: FNV-1a of the token id, weight 1", _routing("hash")),
    variant(
        "effect", _ROUTING, "Random", "`layers.gating.routing` = `random`: distinct experts, weight 1 / top_k, from `seed`", _by_chance
    ),
    variant("effect", _ROUTING, "LoadBased", "`layers.gating.routing` = `least_loaded`", _routing("least_loaded")),
    variant(
        "effect",
        _ROUTING,
        "SimilarityBased",
        "`layers.gating.routing` = `similarity`: cosine to the experts' centroids, best top_k",
        _routing("similarity"),
    ),
    Case(
        "refusal",
        "with load_balancing = ExpertChoiceBased experts choose by the learned scores; tokens do not choose at all",
        "HashBased",
        "others than LearnedGating, with ExpertChoiceBased",
        lambda v: _experts_choose(v) and v[_ROUTING] != "LearnedGating",
        beside={_BALANCING: "ExpertChoiceBased"},
    ),
]


def _pattern(name: str, key: str, says: str) -> Case:
    return variant("effect", _PATTERN, name, f"`communication.pattern` = `{key}`: {says}", lambda v: {"communication.pattern": key})


_COMMUNICATION_PATTERN = [
    _pattern("AllToAll", "all_to_all", "one message per host"),
    _pattern("PointToPoint", "point_to_point", "one message per expert"),
    _pattern("Hierarchical", "hierarchical", "one message per node, passed on within it"),
    _pattern("Ring", "ring", "from host to host, partial sums carried along"),
]

_USE_AUXILIARY_LOSS = [
    Case(
        "effect",
        f"`{_GATING}.aux_loss` = `switch`",
        True,
        "true",
        lambda v: bool(v[f"{TABLE}.use_auxiliary_loss"]),
        lambda v: {f"{_GATING}.aux_loss": "switch"},
    ),
    Case(
        "effect",
        f"`{_GATING}.aux_loss` = `none`",
        False,
        "false",
        lambda v: not v[f"{TABLE}.use_auxiliary_loss"],
        lambda v: {f"{_GATING}.aux_loss": "none"},
    ),
]

_DROP_TOKENS = [
    Case(
        "effect",
        f"`{_GATING}.drop_tokens`",
        True,
        "with tokens that choose",
        lambda v: not _experts_choose(v),
        lambda v: {f"{_GATING}.drop_tokens": v[_DROP]},
    ),
    Case(
        "note",
        "with ExpertChoiceBased the capacity is how many tokens an expert takes, so it always holds",
        False,
        "with ExpertChoiceBased",
        _experts_choose,
        beside={_BALANCING: "ExpertChoiceBased"},
    ),
]

EXPERT_PARAMS = [
    same(f"{TABLE}.num_experts", whole(1), 8, "layers.num_experts", 4, "", beside={f"{TABLE}.experts_per_device": 1}),
    Param(
        f"{TABLE}.experts_per_device",
        whole(1),
        2,
        [
            Case("note", "follows from num_experts and expert_parallel_size, which must agree with it", 2),
        ],
    ),
    Param(
        f"{TABLE}.expert_parallel_size",
        whole(1),
        4,
        [
            Case(
                "effect",
                "`placement.num_hosts` = expert_parallel_size * dp_size * mp_size * pp_size",
                2,
                sets=num_hosts,
                beside={f"{TABLE}.experts_per_device": 4},
            )
        ],
    ),
    Param(
        f"{TABLE}.top_k",
        whole(1),
        2,
        [
            Case("effect", f"`{_GATING}.top_k`", 3, sets=lambda v: {f"{_GATING}.top_k": v[f"{TABLE}.top_k"]}),
            Case(
                "note",
                "with ExpertChoiceBased a token may be taken by any number of experts",
                2,
                "with ExpertChoiceBased",
                _experts_choose,
                beside={_BALANCING: "ExpertChoiceBased"},
            ),
        ],
    ),
    Param(_ROUTING, variant_of(ExpertRoutingStrategy), "LearnedGating", _ROUTING_STRATEGY),
    Param(_BALANCING, variant_of(LoadBalancingStrategy), "TokenChoiceBased", _LOAD_BALANCING),
    same(f"{TABLE}.capacity_factor", real(above=0), 1.25, f"{_GATING}.capacity_factor", 2.0, "rounded by `capacity_rule` = `trustformers`"),
    Param(_DROP, FLAG, False, _DROP_TOKENS),
    Param(f"{TABLE}.use_auxiliary_loss", FLAG, True, _USE_AUXILIARY_LOSS),
    same(f"{TABLE}.auxiliary_loss_weight", real(minimum=0), 0.01, f"{_GATING}.aux_loss_weight", 0.5),
    Param(_PATTERN, variant_of(ExpertCommunicationPattern), "AllToAll", _COMMUNICATION_PATTERN),
]

EXPERT_RULES = [
    at_most(f"{TABLE}.top_k", f"{TABLE}.num_experts"),
    Rule(
        lambda v: v[f"{TABLE}.num_experts"] % v[f"{TABLE}.expert_parallel_size"] != 0,
        lambda v: (
            f"{TABLE}.expert_parallel_size is {v[f'{TABLE}.expert_parallel_size']}; "
            f"allowed: what divides {TABLE}.num_experts = {v[f'{TABLE}.num_experts']}"
        ),
    ),
    Rule(
        lambda v: v[f"{TABLE}.experts_per_device"] * v[f"{TABLE}.expert_parallel_size"] != v[f"{TABLE}.num_experts"],
        lambda v: (
            f"{TABLE}.experts_per_device is {v[f'{TABLE}.experts_per_device']}; allowed: num_experts / expert_parallel_size = "
            f"{v[f'{TABLE}.num_experts'] // v[f'{TABLE}.expert_parallel_size']}"
        ),
    ),
]
