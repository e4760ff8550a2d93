"""A Ray cluster of two nodes on this machine, a service over both, one answer. Run by test_two_nodes.py in a process of its own.

Of four hosts, two per node, only one per node hears from the frontend (hierarchical), or one in all (ring). The second
service scales itself.
"""

from __future__ import annotations

import re
import sys
import tempfile
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from ray.cluster_utils import Cluster

from moeserve import BackgroundService, Client, MoELayer, serve
from moeserve.cluster.ray_internals import allow_clusters
from moeserve.control import timing
from tests.support.closeness import assert_close
from tests.support.waiting import until

timing.BUSY_WINDOW_S = 2.5  # type: ignore[misc]
allow_clusters(False)  # every port on 127.0.0.1
LAYER = {"hidden_size": 64, "intermediate_size": 32, "num_experts": 8}


def metric(service: BackgroundService, series: str) -> str:
    with urllib.request.urlopen(f"http://{service.metrics_target}/metrics") as page:
        found = re.search(rf"^{re.escape(series)} (\S+)$", page.read().decode(), re.MULTILINE)
    return found[1] if found else "0"


def ask(target: str, stop: threading.Event) -> int:
    """Asks without pause, with answers that are compared; returns how often."""
    layer, count = MoELayer(**LAYER), 0
    hidden_states = torch.randn(2000, 64)
    expected = layer(hidden_states)
    with Client(target, retry=False) as client:
        while not stop.is_set():
            assert_close(client.forward(hidden_states).hidden_states, expected)
            count += 1
    return count


def follow_the_load(service: BackgroundService) -> None:
    """One of four hosts leaves while nobody asks, and another one takes the free place while many do."""
    with Client(service.target) as client, ThreadPoolExecutor() as pool:

        def numbers() -> list[int]:
            return [host.number for host in client.stats().hosts]

        until(lambda: len(numbers()) == 3)
        stop = threading.Event()
        asking = [pool.submit(ask, service.target, stop) for _ in range(3)]
        try:
            until(lambda: 4 in numbers())
        finally:
            stop.set()
        print("a host left and one came, all answers right", all(one.result() for one in asking))


def check(address: str, pattern: str) -> None:
    config = {
        "layers": [LAYER],
        "placement": {"num_hosts": 4, "cpus_per_host": 1.0},
        "communication": {"pattern": pattern},
        "server": {"port": 0, "metrics_port": 0},
        "ray": {"address": address},
        "autoscaling": {
            "enabled": pattern == "ring",
            "min_hosts": 3,
            "max_hosts": 4,
            "target_busy": 0.05,  # hosts compute little of the time here, as many processes share few cores
            "scale_up_after_s": 1.0,
            "scale_down_after_s": 1.0,
        },
    }
    with serve(config, progress=lambda line: print(line, flush=True)) as service, Client(service.target) as client:
        hidden_states = torch.randn(50, 64)
        expected = MoELayer(**LAYER)(hidden_states)
        assert_close(client.forward(hidden_states).hidden_states, expected)
        nodes = [host.node for host in client.stats().hosts]
        print("nodes", len(set(nodes)), "hosts on the first", nodes.count(nodes[0]))
        sent = metric(service, f'moeserve_messages_total{{pattern="{pattern}"}}')
        print(pattern, "messages", sent, "retries", metric(service, 'moeserve_expert_retries_total{reason="host_lost"}'))
        if pattern == "ring":
            follow_the_load(service)


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
