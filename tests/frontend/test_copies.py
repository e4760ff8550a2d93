"""Experts with copies: a host that dies is not waited for."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from moeserve import Client, MoELayer
from tests.support.closeness import assert_close
from tests.support.harness import CHANNELS, Killed, Kind, ServiceHarness
from tests.support.held import Held
from tests.support.seen import back, gone

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
            service.call(back(service, victim.number))
        assert service.metrics.registry.get_sample_value("moeserve_host_restarts_total") == 4


class SharedIsPoisoned(Held):
    """The sums of its shared expert are NaN."""

    def run(self, *args: torch.Tensor, out: torch.Tensor) -> None:
        super().run(*args, out=out)
        _, row_index, local_experts, _ = args
        out[row_index[local_experts == self._bank.num_experts - 1].long()] = float("nan")


@pytest.mark.parametrize("fault", ["it is killed", "its sums are not finite"])
def test_a_shared_expert_that_travels_alone_has_a_copy_on_every_host(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a message of its own (point_to_point), it goes from the host to another, also where chosen experts have no copy."""
    is_killed, hidden_states = fault == "it is killed", torch.randn(50, 16)
    config = {"layers": [LAYER], "placement": {"num_hosts": 3, "copies": 1 + is_killed}, "communication": {"pattern": "point_to_point"}}
    with ServiceHarness(config, "local", tmp_path) as service, ThreadPoolExecutor() as callers:
        monkeypatch.setattr(service.hosts[1], "start", lambda: None)
        held = (Held if is_killed else SharedIsPoisoned)(service.hosts[1])
        held.error = Killed() if is_killed else None
        with Client(service.target, retry=False) as client:
            answer = callers.submit(client.forward, hidden_states)
            assert held.begun.acquire(timeout=30)
            held.let_go()
            assert_close(answer.result(40).hidden_states, MoELayer(**LAYER)(hidden_states))
