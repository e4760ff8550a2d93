"""Faults that are injected into hosts do to their callers what real ones do."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moeserve import Client, MoELayer
from moeserve.bench.chaos import ChaosPlan, _Run, run
from moeserve.cluster.thread_fault_injector import ThreadFaultInjector
from moeserve.config import load_config
from tests.support.closeness import assert_close
from tests.support.harness import Kind, ServiceHarness
from tests.support.waiting import until_async

LAYER: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 8, "num_experts": 8, "gating": {"top_k": 2}}
ROWS = torch.randn(40, 16, generator=torch.Generator().manual_seed(5))
CONFIG = {"layers": [LAYER], "placement": {"num_hosts": 2, "copies": 2}, "resilience": {"hang_after_ms": 300}}


@pytest.mark.parametrize("kind", ["local", "shm"])
def test_threads(kind: Kind, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with ServiceHarness(CONFIG, kind, tmp_path) as service, Client(service.target) as client:
        injector = ThreadFaultInjector(service.cluster.hosts)
        expected = MoELayer(**LAYER)(ROWS)

        def becomes(*states: str) -> None:
            """Under load: a host of which nobody wants anything says nothing, whatever its state."""

            async def ask() -> bool:
                out = await asyncio.to_thread(client.forward, ROWS)
                assert_close(out.hidden_states, expected)
                return service.frontend.stats().hosts[1].state in states

            service.call(until_async(ask))

        becomes("up")
        resume = injector.stop(1)
        try:
            becomes("out")
        finally:
            resume()
        assert "host-1 is silent" in caplog.text and "host-1 is stuck" not in caplog.text, "not even its heartbeats go on"
        becomes("up", "slow")
        before = service.hosts[1].info
        injector.poison(1, 3600.0)
        becomes("out")
        injector.kill(1)
        becomes("up", "slow")
        assert service.hosts[1].info != before, "another incarnation, which nobody has poisoned"


@pytest.mark.ray
def test_ray(local_ray: None) -> None:
    """In every way of its own: signals to processes, and a call into one."""
    config = load_config(
        {
            **CONFIG,
            "placement": {"num_hosts": 2, "copies": 2, "cpus_per_host": 0.5},
            "resilience": {"hang_after_ms": 1000},
            "server": {"port": 0, "metrics_port": 0},
        }
    )
    plan = ChaosPlan(("kill", "stop", "nan"), every_s=2.0, for_s=0.1, clients=2, seed=0)
    lines: list[str] = []
    found = asyncio.run(run(config, plan, lines.append)).as_json()
    assert (found["failed"], found["wrong"], found["all_hosts_back"]) == (0, 0, True), (found, lines)
    assert found["faults"] == {"kill": 1, "stop": 1, "nan": 1}, lines
    assert found["sent"] > 0


async def test_a_host_that_is_out_at_the_end_is_waited_for_as_on_a_busy_machine() -> None:
    host = SimpleNamespace(name="host-0", number=0, state="up")

    async def nothing(*_: object) -> None:
        pass

    async def stop() -> None:
        host.state = "out"
        asyncio.get_running_loop().call_later(0.05, setattr, host, "state", "up")

    service: Any = SimpleNamespace(frontend=SimpleNamespace(frontend=SimpleNamespace(stats=lambda: SimpleNamespace(hosts=[host]))))
    load: Any = SimpleNamespace(outcomes={"right": 1}, calls=[], longest_lag_s=0.0, stop=stop)
    breaking: Any = SimpleNamespace(carry_out=nothing)
    plan = ChaosPlan(("kill",), every_s=0.0, for_s=0.0, clients=1, seed=0)
    assert (await _Run(service, load, breaking, lambda _: None).through(plan)).is_whole
