"""A Ray cluster of two nodes on this machine, a service over both, one answer. Run by test_two_nodes.py in a process of its own."""

from __future__ import annotations

import sys

import torch
from ray._private import ray_constants
from ray.cluster_utils import Cluster

from moeserve import Client, MoELayer, serve

ray_constants.ENABLE_RAY_CLUSTER = False  # every port on 127.0.0.1
LAYER = {"hidden_size": 64, "intermediate_size": 32, "num_experts": 8}

if __name__ == "__main__":
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    try:
        config = {
            "layers": [LAYER],
            "placement": {"num_hosts": 2, "cpus_per_host": 1.0},
            "server": {"port": 0, "metrics_port": 0},
            "ray": {"address": cluster.address},
        }
        with serve(config, progress=lambda line: print(line, flush=True)) as service, Client(service.target) as client:
            hidden_states = torch.randn(50, 64)
            torch.testing.assert_close(client.forward(hidden_states).hidden_states, MoELayer(**LAYER)(hidden_states), rtol=1e-5, atol=1e-6)
            print("nodes", len({host.node for host in client.stats().hosts}))
    finally:
        cluster.shutdown()
    sys.stdout.flush()
