"""Hosts follow the load, and no request notices."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from moeserve import Client, ConfigError, MoELayer
from moeserve.client import AdminClient
from moeserve.control import NumHosts, Wanted, timing
from moeserve.experts import ExpertBank
from moeserve.observe.audit import ADMINISTRATOR
from moeserve.release import Release
from tests.support.closeness import assert_close
from tests.support.harness import ServiceHarness
from tests.support.waiting import until

ADMIN = "of the administrator"
LAYER = {"hidden_size": 16, "intermediate_size": 8, "num_experts": 16, "seed": 3, "gating": {"top_k": 1}}
ROW_S = 0.002


@pytest.fixture(autouse=True)
def slow_experts_and_short_periods(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts that take their time without the processor, so that the load is the same on any machine."""
    run = ExpertBank.run

    def slow(self: ExpertBank, hidden_states: torch.Tensor, *args: Any, **more: Any) -> None:
        time.sleep(ROW_S * len(hidden_states))
        run(self, hidden_states, *args, **more)

    monkeypatch.setattr(ExpertBank, "run", slow)
    for name, seconds in (("BUSY_WINDOW_S", 0.5), ("TELL_BUSY_S", 0.1), ("CONTROL_LOOK_S", 0.1)):
        monkeypatch.setattr(timing, name, seconds)


def configuration(folder: Path, num_hosts: int, up_s: float, down_s: float) -> dict[str, Any]:
    (folder / "admin").write_text(ADMIN)
    (folder / "admin").chmod(0o600)
    return {
        "layers": [LAYER],
        "placement": {"num_hosts": num_hosts, "wait_for_nodes_s": 60.0},
        "server": {"admin_token_file": folder / "admin"},
        "autoscaling": {"enabled": True, "max_hosts": 4, "scale_up_after_s": up_s, "scale_down_after_s": down_s},
    }


class Callers:
    """So many that ask, pause, and ask again; they compare every answer with the layer in this process."""

    def __init__(self, target: str, number: int, pause_s: float = 0.0) -> None:
        self._target, self._pause_s, self._stop = target, pause_s, threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(seed,)) for seed in range(number)]
        self._layer, self._failures, self._answered = MoELayer(**LAYER), list[BaseException](), 0

    def __enter__(self) -> None:
        for thread in self._threads:
            thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        assert not self._failures, self._failures[0]
        assert self._answered > 0

    def _run(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        try:
            with Client(self._target, retry=False) as client:
                while not self._stop.wait(self._pause_s):
                    rows, ids = torch.randn(32, 16, generator=generator), torch.randint(16, (32, 1), generator=generator)
                    routed = {"topk_ids": ids, "topk_weights": torch.ones(32, 1)}
                    answer = client.forward(rows, **routed).hidden_states
                    assert_close(answer, self._layer.run(rows, **routed).hidden_states)
                    self._answered += 1
        except BaseException as error:
            self._failures.append(error)


def busy(service: ServiceHarness, number: int) -> float | None:
    return service.metrics.registry.get_sample_value("moeserve_host_busy_ratio", {"host": f"host-{number}"})


def missing(service: ServiceHarness) -> float | None:
    return service.metrics.registry.get_sample_value("moeserve_hosts_missing")


def wanted(service: ServiceHarness) -> float | None:
    return service.metrics.registry.get_sample_value("moeserve_wanted_hosts")


def num_hosts(service: ServiceHarness) -> int:
    return len(service.hosts)


def decided(admin: AdminClient) -> list[tuple[int, int]]:
    """The decisions that the audit log tells of: the numbers of hosts before, and those that were wanted."""
    told = [
        re.fullmatch(r"autoscaling: (1 host was|\d hosts were) \d+% busy, and (\d) have been wanted for .*", each.why)
        for each in admin.events()
    ]
    return [(int(found[1][0]), int(found[2])) for found in told if found is not None]


def test_a_load_gets_hosts_up_to_the_room_and_asks_for_nodes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    asked: list[int] = []
    config = configuration(tmp_path, num_hosts=1, up_s=0.3, down_s=3600.0)
    with ServiceHarness(config, "local", tmp_path) as service, AdminClient(service.target, ADMIN) as admin:
        nodes = service.cluster.nodes
        nodes.cpus = 2

        def ask_for(wanted: Wanted, num_hosts: int) -> None:
            asked.append(num_hosts)

        nodes.ask_for = ask_for  # type: ignore[method-assign]
        until(lambda: busy(service, 0) == 0.0)
        with Callers(service.target, 8):
            until(lambda: (busy(service, 0) or 0) > 0.7 and (busy(service, 1) or 0) > 0.7)
            until(lambda: [host.busy_ratio for host in service.frontend.stats().hosts] == [busy(service, 0), busy(service, 1)])
            until(lambda: asked.count(3) >= 2)
            assert num_hosts(service) == 2 and decided(admin) == [(1, 2)]
            said = [record.getMessage() for record in caplog.records if "the number of hosts stays as it is" in record.getMessage()]
            assert len(said) == 1 and "there is room for 2" in said[0], "what is missing is said once"
            until(lambda: missing(service) in {1, 2} and wanted(service) == 2 + (missing(service) or 0))
        until(lambda: asked[-1] == 2 and missing(service) == 0 and wanted(service) == 2)
        nodes.cpus = 1000
        with Callers(service.target, 8):
            until(lambda: num_hosts(service) == 4 and wanted(service) == 4)
            with pytest.raises(ConfigError, match=r"num_hosts is 5; allowed while autoscaling.enabled is true: 1\.\.4"):
                admin.scale(5)
            admin.scale(1)
            until(lambda: num_hosts(service) == 4)
        assert all(hosts < wanted for hosts, wanted in decided(admin))
        assert [hosts for hosts, _ in decided(admin)].count(1) == 2, "it goes on from there"


def test_what_the_load_needed_once_is_not_missing_for_ever(tmp_path: Path) -> None:
    """Even where the hosts that had room could not join."""
    config = configuration(tmp_path, num_hosts=2, up_s=0.3, down_s=3600.0)
    config["autoscaling"]["target_busy"] = 0.4
    with ServiceHarness(config, "local", tmp_path) as service:

        async def refuse(*_: object) -> Release:
            raise ConfigError("no host can be started")

        service.cluster.nodes.cpus = 3
        service.controller.scale = refuse  # type: ignore[method-assign,assignment]
        with Callers(service.target, 8):
            until(lambda: missing(service) == 1 and wanted(service) == 4)
        until(lambda: missing(service) == 0 and wanted(service) == 2)


def test_hosts_leave_when_fewer_are_enough(tmp_path: Path) -> None:
    config = configuration(tmp_path, num_hosts=4, up_s=3600.0, down_s=0.5)
    with ServiceHarness(config, "local", tmp_path) as service, AdminClient(service.target, ADMIN) as admin:
        with Callers(service.target, 1, pause_s=0.3):
            until(lambda: num_hosts(service) == 1)
            until(lambda: busy(service, 3) is None)
        until(lambda: decided(admin) and decided(admin)[-1][1] == 1)
        (left,) = service.hosts
        until(lambda: busy(service, left.number) is not None)
        left.stop()
        until(lambda: busy(service, left.number) is None)


def test_a_step_that_waited_does_not_undo_what_was_asked_by_hand_meanwhile(tmp_path: Path) -> None:
    config = configuration(tmp_path, num_hosts=1, up_s=0.3, down_s=3600.0)
    with ServiceHarness(config, "local", tmp_path) as service, AdminClient(service.target, ADMIN) as admin:
        scale, decisions, turn = service.controller.scale, list[str](), asyncio.Event()

        async def in_its_turn(num_hosts: NumHosts, why: str = ADMINISTRATOR, instead_of: int | None = None) -> Release:
            if why != ADMINISTRATOR:
                decisions.append(why)
                await turn.wait()
            return await scale(num_hosts, why, instead_of)

        service.controller.scale = in_its_turn  # type: ignore[method-assign]
        with Callers(service.target, 8):
            until(lambda: decisions)
            assert admin.scale(4).epoch == 2
            service.call(_set(turn))
            until(lambda: decided(admin))
        assert num_hosts(service) == 4
        (step,) = [each for each in admin.events() if each.why.startswith("autoscaling")]
        assert step.outcome == "failed" and "another number of hosts has been asked for meanwhile" in step.error


async def _set(event: asyncio.Event) -> None:
    event.set()
