"""A DeepSpeed MoE layer with only its import changed, and the same parameters as a service configuration."""

from __future__ import annotations

import torch
from torch import nn

import moeserve
from moeserve.compat.deepspeed import MoE  # was: from deepspeed.moe.layer import MoE


def main() -> None:
    torch.manual_seed(0)
    parameters = {"hidden_size": 64, "num_experts": 8, "k": 2, "eval_capacity_factor": 1.5}
    expert = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    layer = MoE(expert=expert, **parameters).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        output, l_aux, exp_counts = layer(torch.randn(4, 32, 64))
    print(f"output {list(output.shape)}, l_aux {l_aux.item():.3f}, exp_counts {exp_counts.tolist()}")

    imported = moeserve.compat.load("deepspeed", parameters)
    print(imported.config.layers[0].gating)
    for note in imported.notes:
        print(f"{note.field}: {note.what}")


if __name__ == "__main__":
    main()
