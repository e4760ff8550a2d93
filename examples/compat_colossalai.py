"""A ColossalAI MoE layer with only its import changed, and the same parameters as a service configuration."""

from __future__ import annotations

import torch
from torch import nn

import moeserve
from moeserve.compat.colossalai import Experts, MoeLayer, NormalNoiseGenerator, Top2Router  # was: from colossalai.nn.layer.moe


class FeedForward(nn.Module):
    """One expert."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(d_model, d_ff), nn.Linear(d_ff, d_model)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.down(self.up(hidden_states).relu())
        return output


def main() -> None:
    torch.manual_seed(0)
    router = Top2Router(capacity_factor_eval=1.5, noisy_func=NormalNoiseGenerator(8))
    layer = MoeLayer(dim_model=64, num_experts=8, router=router, experts=Experts(FeedForward, 8, d_model=64, d_ff=256)).eval()
    with torch.no_grad():
        output, l_aux = layer(torch.randn(4, 32, 64))
    print(f"output {list(output.shape)}, l_aux {l_aux.item():.3f}")

    parameters = {
        "router": "Top2Router",
        "capacity_factor_eval": 1.5,
        "noisy_func": "NormalNoiseGenerator",
        "dim_model": 64,
        "num_experts": 8,
    }
    imported = moeserve.compat.load("colossalai", parameters)
    print(imported.config.layers[0].gating)
    for note in imported.notes:
        print(f"{note.field}: {note.what}")


if __name__ == "__main__":
    main()
