"""Serve a checkpoint that DeepSpeed wrote, unchanged: python examples/compat_deepspeed_checkpoint.py [FOLDER K ACTIVATION].

Without a folder, the example first writes one layer to files with the names and contents of DeepSpeed's `save_checkpoint`.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

import moeserve
from moeserve.compat.deepspeed import MoE


def write(folder: Path) -> None:
    """Write a small model instead of a trained one: one MoE layer named `mlp`, with a file per expert and a file for the rest."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"mlp": MoE(64, nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)), num_experts=4, k=2)})
    state = model.state_dict()
    for expert in range(4):
        own = {name: state.pop(name) for name in list(state) if f"deepspeed_experts.{expert}." in name}
        torch.save(own, folder / f"layer_0_expert_{expert}_mp_rank_00_model_states.pt")
    torch.save({"module": state}, folder / "mp_rank_00_model_states.pt")


def main(folder: Path, k: int, activation: str) -> None:
    """Serve the folder. [[layers]] adds what the files do not say: how layers route, and the activation of the experts."""
    original = {"hidden_size": 1, "num_experts": k, "k": k, "top2_2nd_expert_sampling": False, "use_rts": False}
    gating = moeserve.compat.load("deepspeed", original).config.layers[0].gating
    config = {
        "model": {"checkpoint": folder},
        "layers": [{"activation": activation, "gating": gating}],
        "placement": {"num_hosts": 2},
        "server": {"port": 0, "metrics_port": 0},
    }
    with moeserve.serve(config) as service, moeserve.Client(service.target) as client:
        for layer in client.layers():
            out = client.forward(torch.randn(128, layer.hidden_size), layer=layer.name)
            print(f"{layer.name}: {layer.num_experts} experts of {layer.hidden_size} x {layer.intermediate_size}")
            print(f"128 tokens: choices per expert {out.requested.tolist()}, dropped {int(out.dropped.sum())}")


if __name__ == "__main__":
    if len(sys.argv) == 4:
        main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
    else:
        with tempfile.TemporaryDirectory() as written:
            write(Path(written))
            main(Path(written), k=2, activation="gelu")
