"""A host that computes for long is no host that hangs, whatever is usual for it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from moeserve import Client, MoELayer
from tests.support.closeness import assert_close
from tests.support.harness import CHANNELS, Kind, ServiceHarness
from tests.support.held import Held

LAYER = {"hidden_size": 16, "intermediate_size": 8, "num_experts": 4, "gating": {"top_k": 2}}
ROWS = torch.randn(40, 16, generator=torch.Generator().manual_seed(1))
#: three times the bound
PASS_S = 3.0


class Slow(Held):
    """Its next pass takes PASS_S; the time is what is tested, nothing is waited for by it."""

    is_slow = False

    def run(self, *args: torch.Tensor, out: torch.Tensor) -> None:
        if self.is_slow:
            time.sleep(PASS_S)
            self.is_slow = False
        super().run(*args, out=out)


@pytest.mark.parametrize("kind", CHANNELS)
def test_three_seconds_of_computing_are_no_hang(kind: Kind, tmp_path: Path) -> None:
    config = {"layers": [LAYER], "placement": {"num_hosts": 2, "copies": 2}, "resilience": {"hang_after_ms": 1000}}
    with ServiceHarness(config, kind, tmp_path) as service, Client(service.target) as client:
        bank = Slow(service.hosts[0])
        bank.let_go()
        expected = MoELayer(**LAYER)(ROWS)
        for _ in range(40):  # it is known to take milliseconds
            assert_close(client.forward(ROWS).hidden_states, expected)
        bank.is_slow = True
        while bank.is_slow:
            assert_close(client.forward(ROWS).hidden_states, expected)
        kinds = {event.kind for event in service.metrics.events.latest()}
        assert not kinds & {"host_out", "host_lost"}
        assert service.metrics.registry.get_sample_value("moeserve_expert_retries_total", {"reason": "host_lost"}) == 0
