"""A ColossalAI MoE layer with only its import changed: in this process, then saved and served, then with `target=` as a client."""

from __future__ import annotations

import tempfile

import torch
from torch import nn

import moeserve
from moeserve.compat.colossalai import Experts, MoeLayer, NormalNoiseGenerator, Top2Router  # was: from colossalai.nn.layer.moe


def feed_forward(d_model: int, d_ff: int) -> nn.Module:
    """One expert. Your own class works, too, if a service can import it from a module; a class in this script is not enough."""
    return nn.Sequential(nn.Linear(d_model, d_ff), nn.ReLU(), nn.Linear(d_ff, d_model))


def main() -> None:
    torch.manual_seed(0)
    router = Top2Router(capacity_factor_eval=1.5, noisy_func=NormalNoiseGenerator(8))
    layer = MoeLayer(dim_model=64, num_experts=8, router=router, experts=Experts(feed_forward, 8, d_model=64, d_ff=256)).eval()
    inputs = torch.randn(4, 32, 64)
    with torch.no_grad():
        output, l_aux = layer(inputs)
    print(f"in process  output {list(output.shape)}, l_aux {l_aux.item():.3f}")

    with tempfile.TemporaryDirectory() as folder:
        layer.save(folder)
        config = {"model": {"checkpoint": folder}, "placement": {"num_hosts": 2}, "server": {"port": 0, "metrics_port": 0}}
        with moeserve.serve(config) as service:  # or: moeserve serve FOLDER --num-hosts 2
            remote = MoeLayer(64, 8, router, experts=None, target=service.target).eval()
            answer, l_aux = remote(inputs)
    print(f"served      relative difference {(answer - output).norm() / output.norm():.1e}, l_aux {l_aux.item():.3f}")

    parameters = {"router": "Top2Router", "capacity_factor_eval": 1.5, "dim_model": 64, "num_experts": 8, "max_ep_size": 4}
    imported = moeserve.compat.load("colossalai", parameters)
    print(f"{imported.config.placement.num_hosts} hosts; {imported.config.layers[0].gating}")
    for note in imported.notes:
        print(f"{note.field}: {note.what}")


if __name__ == "__main__":
    main()
