"""TrustformeRS' two structs as a service configuration, and a layer of it in this process."""

from __future__ import annotations

import torch

import moeserve
from moeserve.compat.trustformers import ExpertParallelismConfig, LoadBalancingStrategy, MemoryOptimization, ParallelismConfig


def main() -> None:
    experts = ExpertParallelismConfig(load_balancing=LoadBalancingStrategy.ExpertChoiceBased, capacity_factor=2.0)
    parallelism = ParallelismConfig(dp_size=2, memory_optimization=MemoryOptimization.Low)
    mapping = {"expert_parallelism": experts, "parallelism": parallelism, "hidden_size": 64}
    imported = moeserve.compat.load("trustformers", mapping)
    print(f"{imported.config.placement.num_hosts} hosts")
    for note in imported.notes:
        print(f"{note.field}: {note.what}")

    layer = imported.config.layers[0]
    routing = moeserve.route(torch.randn(128, layer.num_experts or 0), layer.gating)
    print(f"every expert takes {routing.processed.tolist()} of 128 tokens")


if __name__ == "__main__":
    main()
