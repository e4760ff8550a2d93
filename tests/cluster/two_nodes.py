"""A Ray cluster of two nodes on this machine, a service over both, one answer. Run by test_two_nodes.py in a process of its own.

Of four hosts, two per node, only one per node hears from the frontend (hierarchical), or one in all (ring).
"""

from __future__ import annotations

import re
import sys
import tempfile
import urllib.request
from pathlib import Path

import torch
from ray.cluster_utils import Cluster

from moeserve import BackgroundService, Client, MoELayer, serve
from moeserve.cluster.ray_internals import allow_clusters
from tests.support.closeness import assert_close

allow_clusters(False)  # every port on 127.0.0.1
LAYER = {"hidden_size": 64, "intermediate_size": 32, "num_experts": 8}


def metric(service: BackgroundService, series: str) -> str:
    with urllib.request.urlopen(f"http://{service.metrics_target}/metrics") as page:
        found = re.search(rf"^{re.escape(series)} (\S+)$", page.read().decode(), re.MULTILINE)
    return found[1] if found else "0"


def check(address: str, pattern: str) -> None:
    config = {
        "layers": [LAYER],
        "placement": {"num_hosts": 4, "cpus_per_host": 1.0},
        "communication": {"pattern": pattern},
        "server": {"port": 0, "metrics_port": 0},
        "ray": {"address": address},
    }
    with serve(config, progress=lambda line: print(line, flush=True)) as service, Client(service.target) as client:
        hidden_states = torch.randn(50, 64)
        expected = MoELayer(**LAYER)(hidden_states)
        assert_close(client.forward(hidden_states).hidden_states, expected)
        nodes = [host.node for host in client.stats().hosts]
        print("nodes", len(set(nodes)), "hosts on the first", nodes.count(nodes[0]))
        sent = metric(service, f'moeserve_messages_total{{pattern="{pattern}"}}')
        print(pattern, "messages", sent, "retries", metric(service, 'moeserve_expert_retries_total{reason="host_lost"}'))


if __name__ == "__main__":
    folders = set(Path(tempfile.gettempdir()).glob("moeserve-*"))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    cluster.add_node(num_cpus=2)
    try:
        for pattern in ("hierarchical", "ring"):
            check(cluster.address, pattern)
    finally:
        cluster.shutdown()
    print("left behind", len(set(Path(tempfile.gettempdir()).glob("moeserve-*")) - folders))
    sys.stdout.flush()
