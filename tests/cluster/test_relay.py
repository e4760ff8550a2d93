"""Hosts that pass rows on, as real processes: kill -9 in the middle of what several share."""

from __future__ import annotations

import os
import re
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from moeserve import Client, MoELayer, serve
from tests.support.closeness import assert_close
from tests.support.ray_service import metric
from tests.support.waiting import until

pytestmark = pytest.mark.ray

HOSTS = 3


@pytest.mark.parametrize(("pattern", "victim"), [("hierarchical", 0), ("ring", 1)])
def test_a_killed_host_loses_nobodys_request(local_ray: None, tiny_moe: Path, pattern: str, victim: int) -> None:
    """The one that passes rows on dies, and one in the middle of the ring: every request is answered right.

    Then the pattern is whole again, because the new incarnation has been introduced to the others.
    """
    local = MoELayer.from_checkpoint(tiny_moe, 1, dtype=torch.float32)
    hidden_states = torch.randn(64, local.spec.hidden_size)
    expected = local(hidden_states)
    pids: dict[str, int] = {}

    def note(line: str) -> None:
        if found := re.match(r"(host-\d) ready .* pid (\d+)", line):
            pids[found[1]] = int(found[2])

    config = {
        "model": {"checkpoint": tiny_moe, "dtype": "float32"},
        "placement": {"num_hosts": HOSTS, "cpus_per_host": 0.5},
        "communication": {"pattern": pattern},
        "server": {"port": 0, "metrics_port": 0},
    }
    warm, recovered = threading.Barrier(4, timeout=60), threading.Event()

    def load(target: str) -> None:
        with Client(target, timeout=60.0) as client:

            def ask(times: int) -> None:
                for _ in range(times):
                    assert_close(client.forward(hidden_states, layer=1).hidden_states, expected)

            ask(10)
            warm.wait()
            while not recovered.is_set():
                ask(1)
            ask(10)

    with serve(config, progress=note) as service, ThreadPoolExecutor() as pool:
        loads = [pool.submit(load, service.target) for _ in range(3)]
        warm.wait()
        assert metric(service, "moeserve_expert_retries_total") == 0
        os.kill(pids[f"host-{victim}"], signal.SIGKILL)
        try:
            until(lambda: metric(service, "moeserve_host_restarts_total") == 1)
        finally:
            recovered.set()
        for future in loads:
            future.result(timeout=90)
        assert metric(service, "moeserve_expert_retries_total") > 0
        with Client(service.target) as client:

            def is_whole() -> bool:
                retries = metric(service, "moeserve_expert_retries_total")
                client.forward(hidden_states, layer=1)
                return metric(service, "moeserve_expert_retries_total") == retries

            until(is_whole)  # the frontend may know of the new incarnation before the other hosts do
