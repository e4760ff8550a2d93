"""Load-balancing losses, one value per request. T tokens, E experts, K choices per token, R requests.

Telemetry when serving: reported with the answer, never part of it. f_e = share of choices or tokens that went to expert e, before drops;
P_e = mean score of e, as a share of the token's scores; all are 1 when both are uniform, but for mindformers: K.

none            0
switch          E * sum_e f_e * P_e, over used tokens; f_e of all choices. Fedus et al. 2021 (arXiv 2101.03961, eq. 4), there for
                K = 1; after Shazeer et al. 2017
deepspeed       K = 1, 2: E * sum_e mean_t(first choices) * mean_t(g), as GShard (arXiv 2006.16668, algorithm 1), `top1gating` and
                `top2gating`; K > 2 as deepspeed_topk. Means are over all tokens; an unused one has a g but no choices
deepspeed_topk  E * sum_e mean_t(choices) * mean_t(g) / K: `topkgating` at any K
colossalai      the same number: `Top1Router` and `Top2Router`
mindformers     sum over the rounds of E^2 * mean_e(mean_t(choice of the round) * mean_t(p / (sum_e p + 1e-9))), where p loses an expert
                once it has taken the token; the mean over the capacity groups: `TopkRouter`, first version
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from moeserve.gating.routing import BatchRouting
from moeserve.gating.segments import Segments

_MINDFORMERS_EPS = 1e-9


def none(probabilities: Tensor, routing: BatchRouting, requests: Segments) -> Tensor:
    return probabilities.new_zeros(len(requests.sizes))


def switch(probabilities: Tensor, routing: BatchRouting, requests: Segments) -> Tensor:
    mean = requests.mean(probabilities)
    requested = routing.requested.float()
    sum_of_products = (requested * mean).sum(dim=1)
    return sum_of_products / requested.sum(dim=1).clamp(min=1) * requests.num_experts


def first_choices(probabilities: Tensor, routing: BatchRouting, requests: Segments) -> Tensor:
    first = slice(0, 1)
    demand = requests.count(routing.topk_ids[:, first], routing.chosen[:, first])
    return _over_all_tokens(demand, probabilities, requests)


def all_choices(probabilities: Tensor, routing: BatchRouting, requests: Segments) -> Tensor:
    return _over_all_tokens(routing.requested, probabilities, requests) / routing.topk_ids.shape[1]


def deepspeed(probabilities: Tensor, routing: BatchRouting, requests: Segments) -> Tensor:
    form = all_choices if routing.topk_ids.shape[1] > 2 else first_choices
    return form(probabilities, routing, requests)


def mindformers(probabilities: Tensor, routing: BatchRouting, requests: Segments) -> Tensor:
    groups, left = routing.groups, probabilities
    by_group = probabilities.new_zeros(len(groups.sizes))
    for round_ in range(routing.topk_ids.shape[1]):
        this = slice(round_, round_ + 1)
        demand = groups.count(routing.topk_ids[:, this], routing.chosen[:, this])
        proxy = groups.sum(left / (left.sum(dim=1, keepdim=True) + _MINDFORMERS_EPS))
        by_group += (demand * proxy).sum(dim=1) / groups.used_tokens.clamp(min=1).square() * groups.num_experts
        left = left.scatter(1, routing.topk_ids[:, this], left.gather(1, routing.topk_ids[:, this]).masked_fill(routing.kept[:, this], 0.0))
    return _mean_of_groups(by_group, groups, requests)


def _over_all_tokens(demand: Tensor, probabilities: Tensor, requests: Segments) -> Tensor:
    tokens = requests.with_unused
    sum_of_products = (demand * tokens.sum(probabilities)).sum(dim=1)
    return sum_of_products / tokens.used_tokens.clamp(min=1).square() * requests.num_experts


def _mean_of_groups(by_group: Tensor, groups: Segments, requests: Segments) -> Tensor:
    """[G] -> [R]: the mean over the groups each request has tokens in, weighted by how many."""
    if groups.sizes == requests.sizes:
        return by_group
    return requests.with_unused.sum(by_group[groups.ids]) / requests.with_unused.used_tokens.clamp(min=1)


#: value of `aux_loss` -> (probabilities [T, E], routing, requests) -> [R] float32, 0 without used tokens
AUX_LOSSES: Mapping[str, Callable[[Tensor, BatchRouting, Segments], Tensor]] = {
    "none": none,
    "switch": switch,
    "deepspeed": deepspeed,
    "deepspeed_topk": all_choices,
    "colossalai": all_choices,
    "mindformers": mindformers,
}
