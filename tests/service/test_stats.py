"""GetStats tells what the frontend knows: placement, queues, durations, calls, events."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from moeserve import Client, InvalidRequest
from moeserve.observe.stats import ServiceStats
from moeserve.observe.summary import as_json, forwards
from tests.support.harness import ServiceHarness
from tests.support.waiting import until

LAYER = {"hidden_size": 16, "intermediate_size": 8, "num_experts": 4}
CONFIG = {
    "layers": [{**LAYER, "gating": {"top_k": 2, "capacity_factor": 1.0}}, {**LAYER, "seed": 1, "gating": {"top_k": 2}}],
    "placement": {"num_hosts": 4, "tensor_parallel": 2, "copies": 2},
}


def host_names(stats: ServiceStats, kind: str) -> list[str]:
    return [event.subject for event in stats.events if event.kind == kind]


def shown(stats: ServiceStats) -> tuple[Any, Any]:
    return as_json(stats)["layers"], as_json(stats)["hosts"]


def test_a_client_sees_what_the_frontend_knows(tmp_path: Path) -> None:
    with ServiceHarness(CONFIG, "shm", tmp_path) as service, Client(service.target) as client:
        before = client.stats()
        for tokens in (3, 40):
            client.forward(torch.randn(tokens, 16), layer=0)
        with pytest.raises(InvalidRequest):
            client.forward(torch.randn(1, 17), layer=0)
        stats = client.stats()

        for number, layer in enumerate(stats.layers):
            placed = {
                (held.host, expert, shard) for held in layer.placement for expert, shard in zip(held.experts, held.shards, strict=True)
            }
            truth = service.placement.layers[number]
            assert placed == {(host, one.expert, one.shard) for host in range(4) for one in truth.shards_on(host)}
            assert len(placed) == 4 * 2 * 2
            assert layer.live_copies == [2] * 4 and layer.tensor_parallel == 2
        assert [layer.tokens for layer in stats.layers] == [43, 0]
        assert sum(stats.layers[0].processed) + sum(stats.layers[0].dropped) == 2 * 43
        assert [sum(one.counts) for one in forwards(stats)] == [3]
        assert {one.name: sum(one.counts) for one in stats.stages} == dict.fromkeys(("queue", "route", "dispatch", "experts", "combine"), 2)
        counts = {(call.method, call.code): call.count for call in stats.calls}
        assert counts[("Forward", "OK")] == 2 and counts[("Forward", "INVALID_ARGUMENT")] == 1
        assert sorted(host_names(stats, "host_up")) == [f"host-{number}" for number in range(4)]
        assert host_names(stats, "call_failed") == ["Forward INVALID_ARGUMENT"]
        assert [host.queue_tokens for host in stats.hosts] == [0] * 4
        assert stats.uptime_s > before.uptime_s > 0
        # How busy hosts are changes by itself.
        until(lambda: shown(client.stats()) == shown(service.frontend.stats()))


def test_a_host_that_goes_and_comes_back_is_told(tmp_path: Path) -> None:
    with ServiceHarness({**CONFIG, "placement": {"num_hosts": 2}}, "shm", tmp_path) as service, Client(service.target) as client:
        started = time.time()
        service.hosts[1].stop()
        stats = until(lambda: host_names(now := client.stats(), "host_lost") and now)
        assert 0 in stats.layers[0].live_copies and not stats.hosts[1].up
        service.hosts[1].start()
        stats = until(lambda: host_names(now := client.stats(), "host_back") and now)
        assert host_names(stats, "host_lost") == host_names(stats, "host_back") == ["host-1"]
        assert all(event.time_unix_s >= started for event in stats.events if event.kind != "host_up")
        assert stats.layers[0].live_copies == [1] * 4


def test_each_host_has_the_queue_of_its_gauge(tmp_path: Path) -> None:
    with ServiceHarness({**CONFIG, "placement": {"num_hosts": 2}}, "local", tmp_path) as service, Client(service.target) as client:
        service.metrics.host_queue_tokens.labels("host-1").inc(7)
        assert [host.queue_tokens for host in client.stats().hosts] == [0, 7]
