"""The gate once more, slow and obviously right: loops over tokens, plain Python numbers.

Scores come in as the float32 values of softmax, because which of two nearly equal scores is larger is decided by their last bits;
softmax itself has a test of its own.
"""

from __future__ import annotations

import math
import struct
from collections import Counter, defaultdict
from dataclasses import dataclass
from decimal import Decimal

from moeserve.config import GatingConfig

EPS = 2.0**-23
PRE_DROP_EPS = 1e-20

Matrix = list[list[float]]
Choice = tuple[int, int]


@dataclass
class Answer:
    topk_ids: list[list[int]]
    topk_weights: Matrix
    kept: list[list[bool]]
    dropped_tokens: list[bool]
    requested: list[list[int]]
    processed: list[list[int]]
    dropped: list[list[int]]
    capacity: list[int | None]
    aux_loss: list[float]
    z_loss: list[float]


def route(
    logits: Matrix,
    scores: Matrix,
    num_experts: int,
    gating: GatingConfig,
    sizes: list[int],
    used: list[bool],
    luck: Matrix,
) -> Answer:
    """`luck` [T, K]: random numbers for drop_policy = "random"."""
    topk_ids = [sorted(range(num_experts), key=lambda e: (-row[e], e))[: gating.top_k] for row in scores]
    topk_scores = [[row[e] for e in ids] for row, ids in zip(scores, topk_ids, strict=True)]
    answer = _admit(topk_ids, topk_scores, num_experts, gating, sizes, used, luck)
    for t, kept in enumerate(answer.kept):
        survivors = [score if is_kept else 0.0 for score, is_kept in zip(topk_scores[t], kept, strict=True)]
        divisor = _divisor(topk_scores[t], survivors, gating)
        answer.topk_weights[t] = [gating.routed_scaling_factor * score / divisor for score in survivors]
    for r, all_tokens in enumerate(_tokens_of(sizes)):
        tokens = [t for t in all_tokens if used[t]]
        if tokens:
            answer.aux_loss[r] = _switch(scores, topk_ids, tokens, num_experts, gating)
            answer.z_loss[r] = _mean([math.log(sum(math.exp(x) for x in logits[t])) ** 2 for t in tokens]) * gating.z_loss_weight
    return answer


def apply_choices(
    topk_ids: list[list[int]], weights: Matrix, num_experts: int, gating: GatingConfig, sizes: list[int], used: list[bool], luck: Matrix
) -> Answer:
    answer = _admit(topk_ids, weights, num_experts, gating, sizes, used, luck)
    for t, kept in enumerate(answer.kept):
        survivors = [weight if is_kept else 0.0 for weight, is_kept in zip(weights[t], kept, strict=True)]
        scale = sum(weights[t]) / sum(survivors) if gating.renormalize == "post_drop" and sum(survivors) > EPS else 1.0
        answer.topk_weights[t] = [weight * scale for weight in survivors]
    return answer


def _divisor(topk_scores: list[float], survivors: list[float], gating: GatingConfig) -> float:
    eps = gating.renormalize_eps
    if gating.renormalize == "pre_drop":
        return sum(topk_scores) + (PRE_DROP_EPS if eps is None else eps)
    if gating.renormalize == "post_drop":
        return max(sum(survivors), EPS) if eps is None else sum(survivors) + eps
    return 1.0


def _admit(
    topk_ids: list[list[int]], scores: Matrix, num_experts: int, gating: GatingConfig, sizes: list[int], used: list[bool], luck: Matrix
) -> Answer:
    top_k = len(topk_ids[0]) if topk_ids else gating.top_k
    requests = _tokens_of(sizes)
    groups = groups_of(gating, sizes)
    kept = [[False] * top_k for _ in topk_ids]
    for tokens in groups:
        capacity = _capacity(len(tokens), num_experts, top_k, gating)
        taken: dict[int, int] = defaultdict(int)
        for t, k in _service_order([(t, k) for t in tokens if used[t] for k in range(top_k)], scores, luck, gating):
            if capacity is None or taken[topk_ids[t][k]] < capacity:
                taken[topk_ids[t][k]] += 1
                kept[t][k] = True
    requested = [_counts([topk_ids[t][k] for t in tokens if used[t] for k in range(top_k)], num_experts) for tokens in requests]
    processed = [_counts([topk_ids[t][k] for t in tokens for k in range(top_k) if kept[t][k]], num_experts) for tokens in requests]
    return Answer(
        topk_ids=topk_ids,
        topk_weights=[[0.0] * top_k for _ in topk_ids],
        kept=kept,
        dropped_tokens=[used[t] and not all(kept[t]) for t in range(len(topk_ids))],
        requested=requested,
        processed=processed,
        dropped=[[a - b for a, b in zip(want, got, strict=True)] for want, got in zip(requested, processed, strict=True)],
        capacity=[_capacity(size, num_experts, top_k, gating) for size in _first_group_sizes(gating, sizes)],
        aux_loss=[0.0] * len(sizes),
        z_loss=[0.0] * len(sizes),
    )


def _capacity(num_tokens: int, num_experts: int, top_k: int, gating: GatingConfig) -> int | None:
    if gating.capacity_factor is None or not gating.drop_tokens:
        return None
    rows = max(rounded(gating.capacity_rule, num_tokens, num_experts, top_k, gating.capacity_factor), gating.min_capacity)
    while rows % gating.capacity_multiple:
        rows += 1
    return rows


def rounded(rule: str, t: int, e: int, k: int, cf: float) -> int:
    """The capacity rules as their systems write them."""
    if rule == "ceil":
        numerator, denominator = Decimal(str(cf)).as_integer_ratio()
        rows, remainder = divmod(k * numerator * t, denominator * e)
        return rows + (remainder > 0)
    if rule == "deepspeed":
        return math.ceil(f32(f32(t / e) * f32(cf * k)))
    if rule in {"colossalai", "colossalai_legacy"}:
        rows = math.floor(k * cf * t / e if rule == "colossalai" else cf * t / e)
        return rows + rows % 2
    if rule == "trustformers":
        return math.ceil(f32(f32(f32(f32(cf) * f32(t)) * f32(k)) / f32(e)))
    rows = math.ceil(k * t * cf / e)
    return min(rows, t) if rule == "mindformers_v2" else rows


def f32(value: float) -> float:
    """To the nearest float32; a product or quotient of two float32 is right after rounding the float64 result once more."""
    rounded_value: float = struct.unpack("f", struct.pack("f", value))[0]
    return rounded_value


def groups_of(gating: GatingConfig, sizes: list[int]) -> list[list[int]]:
    """The tokens of each capacity group."""
    requests = _tokens_of(sizes)
    if gating.capacity_scope == "batch":
        return [[t for tokens in requests for t in tokens]]
    if gating.capacity_scope == "group":
        size = gating.expert_group_size
        assert size
        return [tokens[start : start + size] for tokens in requests for start in range(0, len(tokens), size)]
    return requests


def _first_group_sizes(gating: GatingConfig, sizes: list[int]) -> list[int]:
    return [
        {"request": size, "batch": sum(sizes), "group": min(size, gating.expert_group_size or 0)}[gating.capacity_scope] for size in sizes
    ]


def _service_order(choices: list[Choice], scores: Matrix, luck: Matrix, gating: GatingConfig) -> list[Choice]:
    if gating.drop_policy == "random":
        return sorted(choices, key=lambda choice: (luck[choice[0]][choice[1]], choice))
    if gating.drop_policy == "position":
        return sorted(choices)
    if gating.drop_policy == "choice_major":
        return sorted(choices, key=lambda choice: (choice[1], choice[0]))
    return sorted(choices, key=lambda choice: (-scores[choice[0]][choice[1]], choice))


def _switch(scores: Matrix, topk_ids: list[list[int]], tokens: list[int], num_experts: int, gating: GatingConfig) -> float:
    if gating.aux_loss == "none":
        return 0.0
    loss = 0.0
    for e in range(num_experts):
        share = sum(e in topk_ids[t] for t in tokens) / len(tokens)
        loss += share * _mean([scores[t][e] for t in tokens])
    return num_experts * loss / gating.top_k * gating.aux_loss_weight


def _tokens_of(sizes: list[int]) -> list[list[int]]:
    starts = [sum(sizes[:r]) for r in range(len(sizes))]
    return [list(range(start, start + size)) for start, size in zip(starts, sizes, strict=True)]


def _counts(expert_ids: list[int], num_experts: int) -> list[int]:
    counter = Counter(expert_ids)
    return [counter[e] for e in range(num_experts)]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
