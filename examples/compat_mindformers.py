"""MindFormers' MoEConfig with only its import changed: a service configuration, and a layer of it in this process."""

from __future__ import annotations

import torch

import moeserve
from moeserve.compat.mindformers import MoEConfig  # was: from mindformers.modules.transformer.moe import MoEConfig


def main() -> None:
    config = MoEConfig(expert_num=8, num_experts_chosen=2, capacity_factor=1.5, aux_loss_factor=0.05, moe_intermediate_size=256)
    imported = moeserve.compat.load("mindformers", {**config.to_diff_dict(), "hidden_size": 64})
    for note in imported.notes:
        print(f"{note.field}: {note.what}")

    layer = imported.config.layers[0]
    print(layer.gating)
    assert layer.hidden_size and layer.intermediate_size and layer.num_experts
    run = moeserve.MoELayer(
        hidden_size=layer.hidden_size, intermediate_size=layer.intermediate_size, num_experts=layer.num_experts, gating=layer.gating
    ).run(torch.randn(128, 64))
    print(f"requested {run.requested.tolist()}, dropped {run.dropped.tolist()}, aux_loss {run.aux_loss:.4f}")


if __name__ == "__main__":
    main()
