"""Batches of requests for hypothesis: tiny and full of ties, with every knob of the gate."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from moeserve.config import GatingConfig


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
    def used(self) -> list[bool]:
        return [True] * sum(self.sizes) if self.used_token is None else self.used_token.tolist()


def gatings(num_experts: int, scopes: tuple[str, ...] = ("request", "batch")) -> st.SearchStrategy[GatingConfig]:
    return st.builds(
        GatingConfig,
        top_k=st.integers(1, num_experts),
        renormalize=st.sampled_from(["none", "pre_drop", "post_drop"]),
        routed_scaling_factor=st.sampled_from([1.0, 2.5]),
        capacity_factor=st.sampled_from([None, 0.01, 0.3, 0.5, 1.0, 1.2, 3.0]),
        min_capacity=st.sampled_from([0, 0, 1, 4]),
        capacity_scope=st.sampled_from(scopes),
        drop_tokens=st.sampled_from([True, True, True, False]),
        drop_policy=st.sampled_from(["position", "choice_major", "probs"]),
        aux_loss=st.sampled_from(["switch", "switch", "none"]),
        aux_loss_weight=st.sampled_from([1.0, 0.01]),
        z_loss_weight=st.sampled_from([1.0, 0.001]),
    )


@st.composite
def cases(draw: st.DrawFn, scopes: tuple[str, ...] = ("request", "batch")) -> Case:
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
