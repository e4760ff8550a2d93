"""Batches of requests for hypothesis: tiny and full of ties, with every knob of the gate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from moeserve.config import GatingConfig

SEED = 7


@dataclass
class Case:
    router_logits: Tensor
    gating: GatingConfig
    sizes: list[int]
    used_token: Tensor | None

    @property
    def num_experts(self) -> int:
        return self.router_logits.shape[1]

    @property
    def luck(self) -> list[list[float]]:
        """[T, K]: each request draws from a generator of its own, started from the seed."""
        top_k = self.gating.top_k
        return [row for size in self.sizes for row in torch.rand(size, top_k, generator=torch.Generator().manual_seed(SEED)).tolist()]

    @property
    def used(self) -> list[bool]:
        return [True] * sum(self.sizes) if self.used_token is None else self.used_token.tolist()


SCOPES = ("request", "batch", "group")
RULES = ("ceil", "ceil", "deepspeed", "colossalai", "colossalai_legacy", "mindformers", "mindformers_v2", "trustformers")


def _gating(**knobs: Any) -> GatingConfig:
    """Combinations that GatingConfig refuses, mended."""
    if knobs["capacity_rule"] in {"mindformers", "mindformers_v2", "trustformers"}:
        knobs["min_capacity"] = 0
    if knobs["capacity_scope"] != "group":
        knobs["expert_group_size"] = None
    if knobs["renormalize"] == "none":
        knobs["renormalize_eps"] = None
    return GatingConfig(**knobs)


def gatings(num_experts: int, scopes: tuple[str, ...] = SCOPES) -> st.SearchStrategy[GatingConfig]:
    return st.builds(
        _gating,
        top_k=st.integers(1, num_experts),
        renormalize=st.sampled_from(["none", "pre_drop", "post_drop"]),
        renormalize_eps=st.sampled_from([None, None, 1e-9, 0.5]),
        routed_scaling_factor=st.sampled_from([1.0, 2.5]),
        capacity_factor=st.sampled_from([None, 0.01, 0.3, 0.5, 1.0, 1.2, 3.0]),
        min_capacity=st.sampled_from([0, 0, 1, 4]),
        capacity_rule=st.sampled_from(RULES),
        capacity_multiple=st.sampled_from([1, 1, 1, 3]),
        capacity_scope=st.sampled_from(scopes),
        expert_group_size=st.integers(1, 6),
        drop_tokens=st.sampled_from([True, True, True, False]),
        drop_policy=st.sampled_from(["position", "choice_major", "probs", "random"]),
        seed=st.just(SEED),
        aux_loss=st.sampled_from(["switch", "switch", "none"]),
        aux_loss_weight=st.sampled_from([1.0, 0.01]),
        z_loss_weight=st.sampled_from([1.0, 0.001]),
    )


@st.composite
def cases(draw: st.DrawFn, scopes: tuple[str, ...] = SCOPES) -> Case:
    num_experts = draw(st.integers(1, 9))
    sizes = draw(st.lists(st.integers(0, 9), min_size=1, max_size=4))
    num_tokens = sum(sizes)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    if draw(st.booleans()):
        router_logits = torch.randint(-2, 3, (num_tokens, num_experts), generator=generator).float()
    else:
        router_logits = torch.randn(num_tokens, num_experts, generator=generator)
    used_token = torch.rand(num_tokens, generator=generator) < 0.7 if draw(st.booleans()) else None
    return Case(router_logits, draw(gatings(num_experts, scopes)), sizes, used_token)
