"""The gate against the routers of transformers' own modelling code: the same experts, the same weights.

Their order within a token is not compared (some routers leave it open), so weights stand in a dense [T, E]. Among equal logits `torch.topk`
may take any, so with ties it is the sorted weights that must agree.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from moeserve.config import GatingConfig
from moeserve.gating import route
from moeserve.gating.expert_groups import GROUP_SCORES
from moeserve.gating.scoring import SCORING
from tests.support.closeness import assert_close

transformers = pytest.importorskip("transformers")

HIDDEN = 64


@dataclass(frozen=True)
class Family:
    """`build` makes their router for E experts and K choices, `gating` says the same in our words."""

    build: Callable[[int, int], torch.nn.Module]
    gating: Callable[[int], GatingConfig]
    num_experts: int = 16
    top_k: int = 4


def of(module: str, router: str, config: str, **settings: Any) -> Callable[[int, int], torch.nn.Module]:
    """Their router class, built from their configuration class."""

    def build(num_experts: int, top_k: int) -> torch.nn.Module:
        modelling = __import__(f"transformers.models.{module}.modeling_{module}", fromlist=[router])
        configuration = __import__(f"transformers.models.{module}.configuration_{module}", fromlist=[config])
        experts = dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), num_experts)
        made = getattr(configuration, config)(hidden_size=HIDDEN, num_experts_per_tok=top_k, **experts, **settings)
        built: torch.nn.Module = getattr(modelling, router)(made)
        return built.eval()

    return build


def renormalized(top_k: int) -> GatingConfig:
    return GatingConfig(top_k=top_k, renormalize="pre_drop")


def plain(top_k: int) -> GatingConfig:
    return GatingConfig(top_k=top_k)


def deepseek_v2(top_k: int) -> GatingConfig:
    return GatingConfig(top_k=top_k, num_expert_groups=4, topk_groups=2, routed_scaling_factor=16.0)


def deepseek_v3(top_k: int) -> GatingConfig:
    return GatingConfig(
        top_k=top_k,
        scoring_func="sigmoid",
        num_expert_groups=4,
        topk_groups=2,
        group_score="top2_sum",
        renormalize="pre_drop",
        routed_scaling_factor=2.5,
    )


DEEPSEEK_V2 = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 16.0, "topk_method": "group_limited_greedy"}
DEEPSEEK_V3 = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "norm_topk_prob": True}

FAMILIES = {
    "mixtral": Family(of("mixtral", "MixtralTopKRouter", "MixtralConfig"), renormalized, 8, 2),
    "qwen2_moe": Family(of("qwen2_moe", "Qwen2MoeTopKRouter", "Qwen2MoeConfig", norm_topk_prob=False), plain, 60),
    "qwen2_moe renormalized": Family(of("qwen2_moe", "Qwen2MoeTopKRouter", "Qwen2MoeConfig", norm_topk_prob=True), renormalized, 60),
    "qwen3_moe": Family(of("qwen3_moe", "Qwen3MoeTopKRouter", "Qwen3MoeConfig", norm_topk_prob=False), plain, 128, 8),
    "qwen3_moe renormalized": Family(of("qwen3_moe", "Qwen3MoeTopKRouter", "Qwen3MoeConfig", norm_topk_prob=True), renormalized, 128, 8),
    "olmoe": Family(of("olmoe", "OlmoeTopKRouter", "OlmoeConfig", norm_topk_prob=False), plain, 64, 8),
    "olmoe renormalized": Family(of("olmoe", "OlmoeTopKRouter", "OlmoeConfig", norm_topk_prob=True), renormalized, 64, 8),
    "deepseek_v2": Family(of("deepseek_v2", "DeepseekV2TopkRouter", "DeepseekV2Config", **DEEPSEEK_V2), deepseek_v2),
    "deepseek_v3": Family(of("deepseek_v3", "DeepseekV3TopkRouter", "DeepseekV3Config", **DEEPSEEK_V3), deepseek_v3),
    "glm4_moe": Family(of("glm4_moe", "Glm4MoeTopkRouter", "Glm4MoeConfig", **DEEPSEEK_V3), deepseek_v3, 32),
    "gpt_oss": Family(of("gpt_oss", "GptOssTopKRouter", "GptOssConfig"), lambda k: GatingConfig(top_k=k, scoring_func="softmax_topk"), 32),
    "llama4": Family(
        of("llama4", "Llama4Router", "Llama4TextConfig"),
        lambda k: GatingConfig(top_k=k, scoring_func="sigmoid", scale_inputs=True),
        16,
        1,
    ),
    "phimoe": Family(
        of("phimoe", "PhimoeTopKRouter", "PhimoeConfig", router_jitter_noise=0.01),
        lambda k: GatingConfig(top_k=k, routing="sparsemixer", sparsemixer_eps=0.01),
        16,
        2,
    ),
}


def theirs(router: torch.nn.Module, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """(router_logits [T, E], dense weights [T, E]); Llama 4's router answers with the weights themselves."""
    answer = router(hidden_states)
    if len(answer) == 2:
        weights, logits = answer
        return logits, weights
    logits, weights, ids = answer
    return logits, torch.zeros_like(logits).scatter(1, ids, weights)


def set_up(family: Family, levels: int | None) -> tuple[torch.nn.Module, Tensor, Tensor | None]:
    """Random weights and inputs; of whole numbers, so that many logits are equal, when `levels` is given."""
    generator = torch.Generator().manual_seed(3)
    router = family.build(family.num_experts, family.top_k)
    hidden_states = torch.randn(200, HIDDEN, generator=generator) / 3
    if levels is not None:
        hidden_states = torch.zeros(200, HIDDEN)
        hidden_states[:, :2] = torch.randint(-2, 3, (200, 2), generator=generator).float()
    bias = None
    with torch.no_grad():
        for name, parameter in router.named_parameters():
            values = torch.randn(parameter.shape, generator=generator) * 0.5
            parameter.copy_(values if levels is None else (values * levels).round())
            if name == "bias":
                parameter.copy_(values if levels is None else torch.zeros_like(values))
        for name, buffer in router.named_buffers():
            if name == "e_score_correction_bias":
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.1 * (levels is None))
                bias = buffer
    return router, hidden_states, bias


@pytest.mark.parametrize("name", FAMILIES)
def test_random_logits(name: str) -> None:
    family = FAMILIES[name]
    router, hidden_states, bias = set_up(family, None)
    with torch.no_grad():
        logits, want = theirs(router, hidden_states)
    got = route(logits, family.gating(family.top_k), score_correction_bias=bias)
    assert torch.equal(got.dense() > 0, want > 0)
    assert_close(got.dense(), want, summed=logits.shape[1])


def one_best_set_of_groups(router_logits: Tensor, gating: GatingConfig) -> Tensor:
    """[T] bool: false where equal groups compete for the last place, and the experts depend on which of them wins."""
    if gating.num_expert_groups is None or gating.topk_groups is None:
        return torch.ones(len(router_logits), dtype=torch.bool)
    scores = SCORING[gating.scoring_func](router_logits).view(len(router_logits), gating.num_expert_groups, -1)
    ranked = GROUP_SCORES[gating.group_score](scores).sort(dim=1, descending=True).values
    return ranked[:, gating.topk_groups - 1] != ranked[:, gating.topk_groups]


@pytest.mark.parametrize("name", FAMILIES)
def test_tied_logits(name: str) -> None:
    family = FAMILIES[name]
    router, hidden_states, bias = set_up(family, 2)
    with torch.no_grad():
        logits, want = theirs(router, hidden_states)
    gating = family.gating(family.top_k)
    got = route(logits, gating, score_correction_bias=bias)
    is_defined = one_best_set_of_groups(logits, gating)
    assert is_defined.sum() >= 40
    weights, their_weights = (dense[is_defined].sort(dim=1).values for dense in (got.dense(), want))
    assert_close(weights, their_weights, summed=logits.shape[1])
    if name == "phimoe":  # it takes the first of equals, as we do
        assert torch.equal(got.dense() > 0, want > 0)
