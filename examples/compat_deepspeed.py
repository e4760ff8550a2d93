"""A DeepSpeed MoE layer with only its import changed: in this process, then saved and served, then with `target=` as a client."""

from __future__ import annotations

import tempfile

import torch
from torch import nn

import moeserve
from moeserve.compat.deepspeed import MoE  # was: from deepspeed.moe.layer import MoE


def main() -> None:
    torch.manual_seed(0)
    parameters = {"hidden_size": 64, "num_experts": 8, "k": 2, "eval_capacity_factor": 1.5, "use_residual": True}
    parameters["top2_2nd_expert_sampling"] = False  # true, the default, draws the second expert at random, even in evaluation
    expert = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    layer = MoE(expert=expert, **parameters).eval()  # type: ignore[arg-type]
    hidden_states = torch.randn(4, 32, 64)
    with torch.no_grad():
        output, l_aux, exp_counts = layer(hidden_states)
    print(f"in process  output {list(output.shape)}, l_aux {l_aux.item():.3f}, exp_counts {exp_counts.tolist()}")

    with tempfile.TemporaryDirectory() as folder:
        layer.save(folder)
        config = {"model": {"checkpoint": folder}, "placement": {"num_hosts": 2}, "server": {"port": 0, "metrics_port": 0}}
        with moeserve.serve(config) as service:  # or: moeserve serve FOLDER --num-hosts 2
            remote = MoE(expert=expert, target=service.target, **parameters).eval()  # type: ignore[arg-type]
            answer, l_aux, exp_counts = remote(hidden_states)
    difference = (answer - output).norm() / output.norm()
    print(f"served      relative difference {difference:.1e}, l_aux {l_aux.item():.3f}, exp_counts {exp_counts.tolist()}")

    imported = moeserve.compat.load("deepspeed", parameters)
    print(imported.config.layers[0].gating)
    for note in imported.notes:
        print(f"{note.field}: {note.what}")


if __name__ == "__main__":
    main()
