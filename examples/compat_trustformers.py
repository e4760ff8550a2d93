"""The two configuration structs of TrustformeRS as a service, compared with the same layer in this process."""

from __future__ import annotations

import torch

import moeserve
from moeserve.compat.trustformers import ExpertParallelismConfig, LoadBalancingStrategy, MemoryOptimization, ParallelismConfig


def main() -> None:
    experts = ExpertParallelismConfig(
        expert_parallel_size=1, experts_per_device=8, load_balancing=LoadBalancingStrategy.ExpertChoiceBased, capacity_factor=2.0
    )
    parallelism = ParallelismConfig(dp_size=2, memory_optimization=MemoryOptimization.Low)
    imported = moeserve.compat.load("trustformers", {"expert_parallelism": experts, "parallelism": parallelism, "hidden_size": 64})
    placement, layer = imported.config.placement, imported.config.layers[0]
    print(f"{placement.num_hosts} hosts, {placement.copies} copies of every expert")
    for note in imported.notes:
        print(f"{note.field}: {note.what}")

    hidden_states = torch.randn(128, 64)
    here = moeserve.MoELayer(**layer.model_dump(exclude_unset=True, exclude={"gating"}), gating=layer.gating).run(hidden_states)
    print(f"in process  tokens per expert {here.processed.tolist()} of 128")

    config = imported.config.model_dump(exclude_unset=True) | {"server": {"port": 0, "metrics_port": 0}}
    with moeserve.serve(config) as service, moeserve.Client(service.target) as client:
        out = client.forward(hidden_states)
    difference = (out.hidden_states - here.hidden_states).norm() / here.hidden_states.norm()
    print(f"served      relative difference {difference:.1e}, {out.processed.tolist()}")


if __name__ == "__main__":
    main()
