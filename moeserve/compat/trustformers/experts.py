"""What the fields of TrustformeRS' `ExpertParallelismConfig` mean here."""

from __future__ import annotations

from moeserve.compat.accepts import FLAG, real, variant_of, whole
from moeserve.compat.system import Rule, at_most, divides
from moeserve.compat.table import Param, Row, When, effect, gate, note, of, refusal, same, shown_with
from moeserve.compat.trustformers.hosts import EXPERTS, NUM_HOSTS
from moeserve.compat.trustformers.structs import ExpertCommunicationPattern, ExpertRoutingStrategy, LoadBalancingStrategy

_SIZE, _PER_DEVICE, _HOSTS = f"{EXPERTS}.num_experts", f"{EXPERTS}.experts_per_device", f"{EXPERTS}.expert_parallel_size"
_BALANCING, _ROUTING, _DROP = f"{EXPERTS}.load_balancing", f"{EXPERTS}.routing_strategy", f"{EXPERTS}.drop_tokens"
_EXPERTS_CHOOSE = When("with ExpertChoiceBased", lambda v: v[_BALANCING] == "ExpertChoiceBased", {_BALANCING: "ExpertChoiceBased"})
_TOKENS_CHOOSE = When("with tokens that choose", lambda v: not _EXPERTS_CHOOSE.test(v))
_CHOICES_DISAGREE = When(
    "other than LearnedGating, with ExpertChoiceBased",
    lambda v: _EXPERTS_CHOOSE.test(v) and v[_ROUTING] != "LearnedGating",
    _EXPERTS_CHOOSE.beside,
)


def _pattern(variant: ExpertCommunicationPattern, pattern: str, why: str) -> Row:
    return effect({"communication.pattern": pattern}, why, on=variant)


EXPERT_PARAMS = [
    Param(_SIZE, whole(1), 8).means(effect("layers.num_experts", when=shown_with(**{_PER_DEVICE: 1}), example=4)),
    Param(_PER_DEVICE, whole(1), 2).means(note("follows from num_experts and expert_parallel_size, which must agree with it", example=2)),
    Param(_HOSTS, whole(1), 4).means(effect(NUM_HOSTS, when=shown_with(**{_PER_DEVICE: 4}))),
    Param(f"{EXPERTS}.top_k", whole(1), 2).means(
        effect("layers.gating.top_k"),
        note("with ExpertChoiceBased a token may be taken by any number of experts", when=_EXPERTS_CHOOSE),
    ),
    Param(_ROUTING, variant_of(ExpertRoutingStrategy), "LearnedGating").means(
        effect(gate(routing="learned", renormalize="pre_drop"), "softmax, best top_k", on=ExpertRoutingStrategy.LearnedGating),
        effect(gate(routing="hash"), "FNV-1a of the token id, weight 1", on=ExpertRoutingStrategy.HashBased),
        effect(gate(routing="random", seed=of("seed")), "distinct experts, weight 1 / top_k", on=ExpertRoutingStrategy.Random),
        effect(gate(routing="least_loaded"), on=ExpertRoutingStrategy.LoadBased),
        effect(gate(routing="similarity"), "cosine to the experts' centroids, best top_k", on=ExpertRoutingStrategy.SimilarityBased),
        refusal(
            "with load_balancing = ExpertChoiceBased experts choose by the learned scores; tokens do not choose at all",
            when=_CHOICES_DISAGREE,
            example="HashBased",
        ),
    ),
    Param(_BALANCING, variant_of(LoadBalancingStrategy), "TokenChoiceBased").means(
        effect(gate(drop_tokens=of(_DROP)), "tokens choose", on=LoadBalancingStrategy.TokenChoiceBased),
        effect(
            gate(routing="expert_choice", drop_tokens=True, renormalize="none"),
            "every expert takes its best max(1, floor(capacity_factor * T / E)) tokens",
            on=LoadBalancingStrategy.ExpertChoiceBased,
        ),
        note(
            "not imported: with `[balancing]`, experts and their copies follow the load; answers are the same",
            on=LoadBalancingStrategy.Dynamic,
        ),
        effect(
            {"placement.copy_choice": "round_robin"},
            "the copies of an expert, dp_size of them, are taken in turn",
            on=LoadBalancingStrategy.RoundRobin,
        ),
        effect({"placement.copy_choice": "least_outstanding"}, "the copy with the least to do", on=LoadBalancingStrategy.LoadAware),
    ),
    same(f"{EXPERTS}.capacity_factor", real(above=0), 1.25, "layers.gating.capacity_factor", "rounded by `capacity_rule` = `trustformers`"),
    Param(_DROP, FLAG, False).means(
        effect("layers.gating.drop_tokens", when=_TOKENS_CHOOSE),
        note("the capacity is how many tokens an expert takes, so it always holds", when=_EXPERTS_CHOOSE, example=False),
    ),
    Param(f"{EXPERTS}.use_auxiliary_loss", FLAG, True).means(
        effect(gate(aux_loss="switch"), on=True), effect(gate(aux_loss="none"), on=False)
    ),
    same(f"{EXPERTS}.auxiliary_loss_weight", real(minimum=0), 0.01, "layers.gating.aux_loss_weight"),
    Param(f"{EXPERTS}.communication_pattern", variant_of(ExpertCommunicationPattern), "AllToAll").means(
        _pattern(ExpertCommunicationPattern.AllToAll, "all_to_all", "one message per host"),
        _pattern(ExpertCommunicationPattern.PointToPoint, "point_to_point", "one message per expert"),
        _pattern(ExpertCommunicationPattern.Hierarchical, "hierarchical", "one message per node, which passes it on"),
        _pattern(ExpertCommunicationPattern.Ring, "ring", "from host to host, each of which adds to the sums"),
    ),
]

EXPERT_RULES = [
    at_most(f"{EXPERTS}.top_k", _SIZE),
    divides(_HOSTS, _SIZE),
    Rule(
        lambda v: v[_PER_DEVICE] * v[_HOSTS] != v[_SIZE],
        lambda v: f"{_PER_DEVICE} is {v[_PER_DEVICE]}; allowed: num_experts / expert_parallel_size = {v[_SIZE] // v[_HOSTS]}",
    ),
]
