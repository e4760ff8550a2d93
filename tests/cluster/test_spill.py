"""Ray hosts with memory for a part of their experts: right answers, within that memory, also after a host has died and one has come."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from moeserve import BackgroundService, Client, MoELayer, serve
from tests.support.closeness import assert_close
from tests.support.ray_service import metric, pid_of
from tests.support.waiting import until

pytestmark = pytest.mark.ray

#: bytes of an expert in float32, and how many of its sixteen a host has room for
ONE = 3 * 128 * 256 * 4
ROOM = 6


def test_experts_are_read_when_rows_need_them(tiny_moe: Path, local_ray: None) -> None:
    config = {
        "model": {"checkpoint": tiny_moe, "dtype": "float32"},
        "placement": {"num_hosts": 2, "cpus_per_host": 0.1, "memory_per_host_bytes": ROOM * ONE},
        "store": {"spill": "disk"},
        "server": {"port": 0, "metrics_port": 0},
    }
    references = [MoELayer.from_checkpoint(tiny_moe, layer, dtype=torch.float32) for layer in range(4)]
    with serve(config) as service, Client(service.target, timeout=60.0) as client:

        def right_answers() -> None:
            for seed in range(8):
                for layer, reference in enumerate(references):
                    rows = torch.randn(1 + 5 * seed, 128, generator=torch.Generator().manual_seed(10 * layer + seed))
                    assert_close(client.forward(rows, layer=layer).hidden_states, reference(rows))

        def within_its_memory(hosts: int) -> bool:
            known = client.stats().hosts
            assert all(host.weights_bytes <= ROOM * ONE for host in known)
            return len(known) == hosts

        right_answers()
        assert within_its_memory(2)
        until(lambda: 0 < loads(service) < metric(service, "moeserve_expert_uses_total"))
        os.kill(pid_of(service, "host-1"), signal.SIGKILL)
        right_answers()
        assert service.scale(3) == 2
        right_answers()
        assert within_its_memory(3)


def loads(service: BackgroundService) -> float:
    """Experts that were read because rows needed them."""
    return metric(service, "moeserve_expert_loads_total")
