"""Experts and their copies follow the load, by themselves and by hand; every answer is right meanwhile."""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moeserve import Client, ConfigError, ExpertUnavailable, InvalidRequest, MoELayer, UnknownLayer
from moeserve.cli.app import main
from moeserve.client import AdminClient
from moeserve.control.saved import Saved
from moeserve.placement import layer_balancedness
from tests.support.closeness import assert_close
from tests.support.followers import ThreadedFrontend
from tests.support.harness import ServiceHarness
from tests.support.waiting import until, until_async

ADMIN = "of the administrator"
LAYER = {"hidden_size": 16, "intermediate_size": 8, "num_experts": 16, "seed": 3, "gating": {"top_k": 1}}
#: Zipf: the first experts share a host, as placed at first
ZIPF = np.arange(1, 17) ** -1.2
ZIPF = ZIPF / ZIPF.sum()


def configuration(folder: Path, **balancing: object) -> dict[str, Any]:
    (folder / "admin").write_text(ADMIN)
    (folder / "admin").chmod(0o600)
    return {
        "layers": [LAYER],
        "placement": {"num_hosts": 4},
        "server": {"admin_token_file": folder / "admin"},
        "balancing": {"extra_copies": 0.5, "window_s": 6.0, "interval_s": 0.3, **balancing},
    }


class Callers:
    """Two that have routed already, by Zipf's law, and compare every answer with the layer in this process."""

    def __init__(self, target: str, share: np.ndarray = ZIPF) -> None:
        self._target, self._share, self._stop = target, share, threading.Event()
        self._layer, self.answered = MoELayer(**LAYER), 0
        self._failure: BaseException | None = None

    def __enter__(self) -> Callers:
        self._threads = [threading.Thread(target=self._run, args=(seed,)) for seed in range(2)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        assert self._failure is None, self._failure
        assert self.answered > 0

    def _run(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            with Client(self._target) as client:
                while not self._stop.is_set():
                    ids = torch.from_numpy(rng.choice(16, (1000, 1), p=self._share))
                    rows = torch.from_numpy(rng.standard_normal((1000, 16), dtype=np.float32))
                    routed = {"topk_ids": ids, "topk_weights": torch.ones(1000, 1)}
                    assert_close(client.forward(rows, **routed).hidden_states, self._layer.run(rows, **routed).hidden_states)
                    self.answered += 1
                    self._stop.wait(0.02)
        except BaseException as error:
            self._failure = error


def balancedness(service: ServiceHarness, share: np.ndarray = ZIPF) -> float:
    (even,) = layer_balancedness(service.controller.state.release.placement, [share])
    assert even is not None
    return even


def metric(service: ServiceHarness, name: str, **labels: str) -> float:
    return service.metrics.registry.get_sample_value(name, labels) or 0.0


def rounds(service: ServiceHarness, outcome: str) -> float:
    return metric(service, "moeserve_rebalances_total", outcome=outcome)


def copies(service: ServiceHarness) -> list[int]:
    layer = service.controller.state.release.placement.layers[0]
    return (layer.copies >= 0).sum(axis=1).tolist()


def test_a_skewed_load_is_balanced_within_two_rounds_and_then_nothing_moves(tmp_path: Path) -> None:
    with ServiceHarness(configuration(tmp_path, enabled=True), "local", tmp_path) as service:
        assert balancedness(service) < 0.5
        with Callers(service.target):
            until(lambda: rounds(service, "moved") >= 1)
            until(lambda: balancedness(service) >= 0.9)
            epoch, still = service.controller.state.release.epoch, rounds(service, "unchanged")
            # What has moved is counted when its round has ended, and seen a moment later.
            until(lambda: rounds(service, "unchanged") >= still + 5)
            assert service.controller.state.release.epoch == epoch and rounds(service, "moved") <= 2
        assert sum(copies(service)) <= 24
        assert metric(service, "moeserve_host_balancedness_ratio", layer="layers.0") >= 0.85
        assert metric(service, "moeserve_moved_experts_total") > 0
        assert metric(service, "moeserve_moved_bytes_total") > 0
        told = [event for event in service.frontend.stats().events if event.kind.startswith("rebalance")]
        assert {event.kind for event in told} == {"rebalance_moved"} and sum(event.count for event in told) == rounds(service, "moved")
        with AdminClient(service.target, ADMIN) as admin:
            recorded = [event for event in admin.events() if event.kind == "balance"]
        assert {(event.why, event.outcome) for event in recorded} == {("balancing", "done")}
        assert len(recorded) == rounds(service, "moved"), "none of those that moved nothing"
        assert sum(event.moves + event.new for event in recorded) == metric(service, "moeserve_moved_experts_total")
        assert sum(event.moved_bytes for event in recorded) == metric(service, "moeserve_moved_bytes_total")
        with Callers(service.target, ZIPF[::-1]):
            until(lambda: balancedness(service, ZIPF[::-1]) >= 0.9)


def test_when_callers_turn_to_other_experts_nobody_waits_for_the_interval(tmp_path: Path) -> None:
    config = configuration(tmp_path, enabled=True, interval_s=3600.0, window_s=4.0, min_gain=0.2)
    with by_harness(config, tmp_path) as (service, admin):
        with Callers(service.target):
            until(lambda: admin.rebalance().balancedness and balancedness(service) > 0.75)
        before = service.frontends.balancing.rounds["moved"]
        assert balancedness(service, ZIPF[::-1]) < 0.6
        with Callers(service.target, ZIPF[::-1]):
            until(lambda: rounds(service, "moved") > before)
        assert balancedness(service, ZIPF[::-1]) > 0.7
        assert [event.why for event in admin.events() if event.kind == "balance"][-1] == "balancing"


@contextmanager
def by_hand(folder: Path, **balancing: object) -> Iterator[tuple[ServiceHarness, AdminClient]]:
    with by_harness(configuration(folder, **balancing), folder) as both:
        yield both


@contextmanager
def by_harness(config: dict[str, Any], folder: Path) -> Iterator[tuple[ServiceHarness, AdminClient]]:
    with ServiceHarness(config, "local", folder) as service, AdminClient(service.target, ADMIN) as admin:
        yield service, admin


def test_by_hand_in_small_steps_as_all_frontends_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shell, may_go_on = ["--admin-token-file", str(tmp_path / "admin")], threading.Event()
    with by_hand(tmp_path, max_moved_bytes=1) as (service, admin):
        service.call(service.open_control())
        nothing = admin.rebalance()
        assert (nothing.epoch, nothing.moves, nothing.steps) == (1, 0, 0), "nobody has asked for anything"
        take = service.cluster.hosts.take

        async def take_later(*args: Any) -> None:
            await until_async(may_go_on.is_set)
            await take(*args)

        monkeypatch.setattr(service.cluster.hosts, "take", take_later)
        with ThreadedFrontend(service.control_target) as elsewhere, Callers(elsewhere.target):
            planned = until(lambda: (plan := admin.rebalance(dry_run=True)).steps and plan)
            assert service.controller.state.release.epoch == 1, "a dry run changes nothing"
            assert planned.balancedness_before < 0.6 and planned.balancedness >= 0.85
            assert main(["rebalance", service.target, *shell, "--dry-run"]) == 0
            assert "experts would move" in capsys.readouterr().out
            with ThreadPoolExecutor(1) as pool, Client(service.target) as client, Client(elsewhere.target) as other:
                ways: list[Callable[[], Any]] = [client.stats, other.stats, admin.status]
                rebalancing = pool.submit(main, ["rebalance", service.target, *shell, "--json"])
                seen = until(lambda: all(now := [ask().changing for ask in ways]) and now)  # everybody sees what is under way
                may_go_on.set()
                while not rebalancing.done():
                    seen += [ask().changing for ask in ways]
                assert rebalancing.result() == 0
            done = json.loads(capsys.readouterr().out)
            assert all(text == "" or re.fullmatch(rf"balance, step \d+ of {done['steps']}", text) for text in seen)
            nothing, moved = (event for event in admin.events() if event.kind == "balance")
            assert (nothing.moves, nothing.new, nothing.moved_bytes, nothing.outcome) == (0, 0, 0, "done")
            assert (moved.moves, moved.new, moved.moved_bytes) == (done["moves"], done["new"], done["moved_bytes"])
            assert (moved.why, moved.epoch) == ("administrator", done["epoch"])
            assert moved.what.startswith(f"{done['steps']} of {done['steps']} steps")
            assert done["steps"] == done["moves"] + done["new"] == done["epoch"] - 1, "one expert in each step"
            assert balancedness(service) >= 0.85
            held = copies(service)
            admin.scale(5)
            assert copies(service) == held, "a change of hosts keeps the copies"


def test_where_there_is_little_room_experts_move_in_steps(tmp_path: Path) -> None:
    """Two hosts have all that is asked for, and give two experts each to the others, which have room for one."""
    one, share = 3 * 16 * 8 * 4, np.repeat([0.12, 0.005], 8)
    config = configuration(tmp_path, extra_copies=0.0)
    config["placement"]["memory_per_host_bytes"] = 5 * one
    with ServiceHarness(config, "local", tmp_path) as service, AdminClient(service.target, ADMIN) as admin, Callers(service.target, share):
        until(lambda: (planned := admin.rebalance(dry_run=True)).moves > 4 and planned.balancedness > 0.8)
        assert admin.rebalance().steps > 1


def test_placement_and_demand_as_everybody_shows_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The controller to programs and to people, a frontend, `top` and the metrics."""
    shell = ["--admin-token-file", str(tmp_path / "admin")]
    with by_hand(tmp_path, interval_s=0.1) as (service, admin), Client(service.target) as client:
        (before,) = admin.status().layers
        assert (before.copies, before.demand_rows_per_s, before.host_balancedness) == ([1] * 16, [0.0] * 16, None)
        admin.scale_copies(2, "layers.0", 0)
        until(lambda: service.is_counting)
        with Callers(service.target):
            until(lambda: sum(admin.status().layers[0].demand_rows_per_s) > 5000)
        until(lambda: service.heard == client.stats().layers[0].tokens)
        status = admin.status()
        (layer,) = status.layers
        rows = np.array(layer.demand_rows_per_s)
        assert np.abs(rows / rows.sum() - ZIPF).max() < 0.03
        assert layer.copies == copies(service) == [2] + [1] * 15
        held = Counter(expert for host in layer.placement for expert in host.experts)
        assert [held[expert] for expert in range(16)] == layer.copies
        assert status.epoch == client.stats().epoch == service.controller.state.release.epoch
        (even,) = layer_balancedness(service.controller.state.release.placement, [rows])
        assert even is not None and layer.host_balancedness == pytest.approx(even)
        until(lambda: client.stats().layers[0].host_balancedness == pytest.approx(even, abs=0.01))
        assert metric(service, "moeserve_host_balancedness_ratio", layer="layers.0") == pytest.approx(even, abs=0.01)
        assert main(["status", service.target, *shell]) == 0
        row = next(line for line in capsys.readouterr().out.splitlines() if "layers.0" in line).split()
        assert row[4] == "1-2" and row[6] == f"0:{rows[0] / rows.sum():.0%}" and float(row[7]) == pytest.approx(even, abs=0.01)
        assert main(["top", service.target, "--once"]) == 0
        row = next(line for line in capsys.readouterr().out.splitlines() if "layers.0" in line).split()
        assert float(row[6]) == pytest.approx(even, abs=0.02) and row[7] == "1-2" and row[8].startswith("0:")


def test_while_a_host_is_down_nothing_moves(tmp_path: Path) -> None:
    with by_hand(tmp_path) as (service, admin):
        with Callers(service.target):
            until(lambda: admin.rebalance(dry_run=True).steps)
        service.hosts[2].stop()
        until(lambda: 2 not in service.present)
        with pytest.raises(ExpertUnavailable, match="host-2 is down: nothing moves to balance the load"):
            admin.rebalance()
        (stopped,) = (event for event in admin.events() if event.kind == "balance")
        assert (stopped.outcome, stopped.moves) == ("stopped", 0) and stopped.error.startswith("host-2 is down")
        until(lambda: rounds(service, "stopped") == 1)
        until(lambda: "rebalance_stopped" in [event.kind for event in service.frontend.stats().events])


def test_copies_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shell = ["--admin-token-file", str(tmp_path / "admin")]
    rows = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    with by_hand(tmp_path) as (service, admin), Client(service.target) as client:
        assert admin.scale_copies(3, "layers.0", 5).epoch == 2
        assert copies(service) == [1] * 5 + [3] + [1] * 10
        assert main(["scale", service.target, *shell, "--layer", "0", "--expert", "6", "--copies", "2"]) == 0
        assert "epoch 3" in capsys.readouterr().out
        assert copies(service) == [1] * 5 + [3, 2] + [1] * 9, "what was asked before stays"
        saved = Saved.from_bytes(service.cluster.store.load() or b"")
        assert saved.state.copies == service.controller.state.copies == {"default": 1, "layers.0": {"default": 1, "5": 3, "6": 2}}
        service.call(service.controller.scale(3))
        assert copies(service)[5:7] == [3, 2]
        for arguments, error, sentence in (
            ((4, "layers.0", 5), ConfigError, "placement.copies is 4 for layer layers.0, which has 3 hosts"),
            ((2, "layers.0", 16), ConfigError, "expert is 16; allowed: 0..15"),
            ((0, "layers.0", 5), ConfigError, "copies is 0; allowed: 1.."),
            ((2, "layers.7", None), UnknownLayer, "there is no layer 'layers.7'; served: layers.0"),
            ((2, 1, None), UnknownLayer, "there is no layer 1; served: 0..0"),
            ((2, True, None), InvalidRequest, "layer must be a position or a name, got bool"),
            ((2, "", 5), ConfigError, "an expert needs a layer"),
        ):
            with pytest.raises(error, match=sentence):
                admin.scale_copies(*arguments)
        with pytest.raises(ConfigError, match="which has 2 hosts"):
            service.call(service.controller.scale(2))
        assert copies(service)[5:7] == [3, 2]
        assert_close(client.forward(rows).hidden_states, MoELayer(**LAYER)(rows))
        admin.scale_copies(1, "layers.0")
        assert copies(service) == [1] * 16
        admin.scale_copies(2)
        assert copies(service) == [2] * 16
        assert main(["scale", service.target, *shell, "--expert", "6"]) == 2
        assert main(["scale", service.target, *shell, "--hosts", "2", "--copies", "2"]) == 2
        assert_close(client.forward(rows).hidden_states, MoELayer(**LAYER)(rows))


@pytest.mark.parametrize("leave", [lambda admin: admin.scale(2), lambda admin: admin.drain("host-1")], ids=["scale", "drain"])
def test_hosts_full_of_copies_let_others_leave(tmp_path: Path, leave: Callable[[AdminClient], object]) -> None:
    """Those that stay give copies away before they get what the others held."""
    config = configuration(tmp_path)
    config["placement"] = {"num_hosts": 3, "memory_per_host_bytes": 9 * 3 * 16 * 8 * 4}
    with ServiceHarness(config, "local", tmp_path) as service, AdminClient(service.target, ADMIN) as admin:
        with Callers(service.target):
            until(lambda: admin.rebalance().epoch > 1 and sum(copies(service)) > 18)
            leave(admin)
            assert len(service.hosts) == 2 and min(copies(service)) == 1
        (left,) = (event for event in admin.events() if event.kind in {"scale", "drain"})
        assert left.outcome == "done" and left.moves > 0
