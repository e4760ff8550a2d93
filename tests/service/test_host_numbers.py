"""While hosts are replaced there are more of them than hold experts: whatever is said of a host is said of that one."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from rich.console import Console

from moeserve import Client
from moeserve.cli.app import main
from moeserve.cli.top_view import view
from moeserve.client import AdminClient
from moeserve.observe.summary import as_json
from tests.support.closeness import assert_close
from tests.support.harness import ServiceHarness
from tests.support.held import Held
from tests.support.two_layers import CONFIG, tokens
from tests.support.waiting import until_async

ADMIN = "of the administrator"


def rows(text: str) -> dict[str, str]:
    """Of a table for people, by host."""
    return {line.split()[0]: line for line in text.splitlines() if line.strip().startswith("host-")}


def test_a_drain_and_a_replacement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "admin").write_text(ADMIN)
    config = {**CONFIG, "placement": {"num_hosts": 3}, "server": {"port": 0, "admin_token_file": tmp_path / "admin"}}
    with ServiceHarness(config, "local", tmp_path) as service, Client(service.target) as client, ThreadPoolExecutor() as pool:
        held = Held(service.hosts[1], 0)
        before = client.stats()
        waiting = pool.submit(client.forward, tokens(0), 0)
        assert held.begun.acquire(timeout=30)
        draining = pool.submit(service.call, service.controller.drain("host-1"))
        service.call(until_async(lambda: service.frontend.epoch == 2))

        stats = client.stats()
        assert [(host.number, host.name) for host in stats.hosts] == [(0, "host-0"), (1, "host-1"), (2, "host-2")]
        truth = service.controller.state.release.placement
        for index, layer in enumerate(stats.layers):
            assert {held.host: list(held.experts) for held in layer.placement} == {
                number: [shard.expert for shard in truth.layers[index].shards_on(number)] for number in (0, 2)
            }
        counts = {f"host-{n}": sum(len(layer.shards_on(n)) for layer in truth.layers) for n in range(3)}
        assert {one["host"] for layer in as_json(stats)["layers"] for one in layer["placement"]} == {"host-0", "host-2"}
        Console(width=140).print(view(service.target, stats, before, 140))
        assert {name: int(line.split()[-1]) for name, line in rows(capsys.readouterr().out).items()} == counts

        with AdminClient(service.target, ADMIN) as admin:
            status = admin.status()
        assert [(host.number, host.name) for host in status.hosts] == [(0, "host-0"), (2, "host-2")]
        assert {held.host for layer in status.layers for held in layer.placement} == {0, 2}

        held.leave.release()
        assert_close(waiting.result(timeout=30).hidden_states, client.forward(tokens(0), 0).hidden_states)
        assert draining.result(timeout=30).placement.hosts == (0, 2)

        service.call(service.controller.scale(3))
        stats, truth = client.stats(), service.controller.state.release.placement
        assert [host.number for host in stats.hosts] == [0, 2, 3]
        assert {held.host for held in stats.layers[0].placement} == {0, 2, 3}
        assert main(["status", service.target, "--admin-token-file", str(tmp_path / "admin"), "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert [host["number"] for host in told["hosts"]] == [0, 2, 3]
        assert {one["host"] for layer in told["layers"] for one in layer["placement"]} == {0, 2, 3}
        assert main(["status", service.target, "--admin-token-file", str(tmp_path / "admin")]) == 0
        shown = rows(capsys.readouterr().out)
        for number in (0, 2, 3):
            assert f" {sum(len(layer.shards_on(number)) for layer in truth.layers)} " in shown[f"host-{number}"]
