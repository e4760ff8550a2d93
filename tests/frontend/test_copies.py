"""Experts with copies: a host that dies is not waited for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moeserve import Client, MoELayer
from tests.support.closeness import assert_close
from tests.support.harness import CHANNELS, Kind, ServiceHarness
from tests.support.seen import gone

LAYER = {"hidden_size": 16, "intermediate_size": 24, "num_experts": 6, "shared_expert": {"intermediate_size": 8}, "gating": {"top_k": 3}}


@pytest.mark.parametrize("tensor_parallel", [1, 2])
@pytest.mark.parametrize("kind", CHANNELS)
def test_with_a_copy_elsewhere_every_request_is_answered_while_a_host_is_gone(kind: Kind, tensor_parallel: int, tmp_path: Path) -> None:
    placement = {"num_hosts": 4, "copies": 2, "tensor_parallel": tensor_parallel}
    config = {"layers": [LAYER], "placement": placement, "resilience": {"on_expert_failure": "fail"}}
    hidden_states = torch.randn(50, 16)
    expected = MoELayer(**LAYER)(hidden_states)
    with ServiceHarness(config, kind, tmp_path) as service, Client(service.target) as client:
        for victim in service.hosts:
            victim.stop()
            assert_close(client.forward(hidden_states).hidden_states, expected)
            service.call(gone(service, victim.number))
            assert_close(client.forward(hidden_states).hidden_states, expected)
            victim.start()
            service.call(service.frontend._links[victim.number].connected())
        assert service.metrics.registry.get_sample_value("moeserve_host_restarts_total") == 4
