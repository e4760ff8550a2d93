"""Noise of the gate, off unless asked for; with a seed it is the same in every run. T tokens, H hidden size, E experts.

jitter          hidden states * U(1 - eps, 1 + eps) in front of the gate: Switch (arXiv 2101.03961), DeepSpeed `Jitter`, Mixtral
normal          logits + N(0, std), std = 1 / E^2 unless given: Shazeer et al. 2017 (arXiv 1701.06538), ColossalAI
                `NormalNoiseGenerator`
uniform         logits * U(1 - eps, 1 + eps): ColossalAI `UniformNoiseGenerator`
rsample         chosen by x + Gumbel instead of the scores, weights without noise: DeepSpeed `RSample`
gumbel_second   the same for the second choice alone: DeepSpeed `top2_2nd_expert_sampling`

The last two are part of the selection, in routings/learned.py.
"""

from __future__ import annotations

from torch import Tensor

from moeserve.config import GatingConfig
from moeserve.gating.chance import Chance

DEFAULT_EPS = 1e-2


def shake_hidden_states(hidden_states: Tensor, gating: GatingConfig, chance: Chance) -> Tensor:
    """[T, H] float32 -> the same, times jitter if that is asked for."""
    return hidden_states * _around_one(hidden_states, gating, chance) if gating.noise == "jitter" else hidden_states


def shake_logits(router_logits: Tensor, gating: GatingConfig, chance: Chance) -> Tensor:
    """[T, E] float32 -> the same with the noise that acts on logits."""
    if gating.noise == "uniform":
        return router_logits * _around_one(router_logits, gating, chance)
    if gating.noise == "normal":
        num_experts = router_logits.shape[1]
        std = 1 / num_experts**2 if gating.noise_scale is None else gating.noise_scale
        return router_logits + std * chance.normal(num_experts)
    return router_logits


def _around_one(values: Tensor, gating: GatingConfig, chance: Chance) -> Tensor:
    eps = DEFAULT_EPS if gating.noise_scale is None else gating.noise_scale
    return 1 - eps + 2 * eps * chance.uniform(values.shape[1])
