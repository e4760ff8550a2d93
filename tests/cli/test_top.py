"""`moeserve top` against a whole service: its numbers are the service's, at any width."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from rich.console import Console

from moeserve import Client
from moeserve.cli.app import main
from moeserve.cli.top_view import view
from moeserve.client import AdminClient
from moeserve.observe.page.document import load_document
from moeserve.observe.page.endpoint import public_json
from moeserve.observe.stats import HostShards, HostStats, LayerStats, ServiceStats
from moeserve.observe.summary import balancedness, demand, host_shares
from tests.support.harness import ServiceHarness
from tests.support.waiting import until

ADMIN = "of the administrator"
LAYER = {"hidden_size": 16, "intermediate_size": 8, "num_experts": 8}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceHarness]:
    layers = [{**LAYER, "gating": {"top_k": 2, "capacity_factor": 1.0}}, {**LAYER, "gating": {"top_k": 1}}]
    (token := tmp_path_factory.mktemp("token") / "admin").write_text(ADMIN)
    config = {
        "layers": layers,
        "placement": {"num_hosts": 2},
        "server": {"port": 0, "admin_token_file": token},
        "balancing": {"interval_s": 0.1},
    }
    with ServiceHarness(config, "local", tmp_path_factory.mktemp("s")) as harness:
        until(lambda: harness.is_counting)
        with Client(harness.target) as client:
            client.forward(torch.randn(1234, 16), layer=0)
            until(lambda: client.stats().layers[0].host_balancedness)
        yield harness


def shown(picture: object, width: int, **options: object) -> str:
    text = io.StringIO()
    Console(file=text, width=width, highlight=False, **options).print(picture)
    return text.getvalue()


@pytest.mark.parametrize("width", ["80", "140"])
def test_one_picture(capsys: pytest.CaptureFixture[str], service: ServiceHarness, monkeypatch: pytest.MonkeyPatch, width: str) -> None:
    monkeypatch.setenv("COLUMNS", width)
    assert main(["top", service.target, "--once"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert max(map(len, lines)) <= int(width) and "…" not in out.replace("none … 4 times", "")
    stats = service.frontend.stats()
    wanted, layer = demand(stats.layers[0]), stats.layers[0]
    row = next(line for line in lines if "layers.0" in line).split()
    dropped = int(layer.dropped.sum()) / sum(wanted)
    assert (row[2], row[4], row[5]) == ("1,234", f"{dropped:.1%}", f"{balancedness(wanted):.2f}")
    assert (row[6], row[7]) == (f"{layer.host_balancedness:.2f}", "1")
    assert int(row[8].split(":")[0]) == wanted.index(max(wanted))
    shares = host_shares(stats.layers, [demand(layer) for layer in stats.layers])
    loads = [line.split()[-2] for line in lines if line.startswith("host-")]
    assert width == "80" or loads == [f"{shares[number]:.0%}" for number in range(2)]
    assert [line.split()[:4] for line in lines if line.startswith("host-")] == [[f"host-{n}", "up", "this-node", "cpu"] for n in range(2)]
    assert sum(int(line.split()[-1]) for line in lines if line.startswith("host-")) == 2 * 8
    assert "host up" in out


def test_json(capsys: pytest.CaptureFixture[str], service: ServiceHarness) -> None:
    assert main(["top", service.target, "--once", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    stats = service.frontend.stats()
    assert [layer["tokens"] for layer in said["layers"]] == [1234, 0]
    assert said["layers"][0]["dropped"] == stats.layers[0].dropped.tolist()
    assert said["layers"][0]["balancedness"] == balancedness(demand(stats.layers[0]))
    assert {held["host"]: held["experts"] for held in said["layers"][1]["placement"]} == {
        f"host-{host}": [one.expert for one in service.placement.layers[1].shards_on(host)] for host in range(2)
    }
    assert [host["name"] for host in said["hosts"]] == ["host-0", "host-1"]
    assert sum(host["demand_share"] for host in said["hosts"]) == pytest.approx(1.0)
    assert said["changing"] == "" and said["layers"][1]["host_balancedness"] is None
    forward = next(one for one in said["requests"] if one["name"] == "Forward")
    assert sum(forward["counts"]) == 1 and 0 < forward["p50_ms"] <= forward["p99_ms"]


def test_the_threads_of_a_host_are_shown_wherever_hosts_are(capsys: pytest.CaptureFixture[str], service: ServiceHarness) -> None:
    """The same for any number of a host: to programs, as JSON, in tables, and on the page, which asks for no token."""
    with Client(service.target) as client, AdminClient(service.target, ADMIN) as admin:
        assert [host.num_threads for host in (*client.stats().hosts, *admin.status().hosts)] == [1] * 4
    token = ("--admin-token-file", str(service.config.server.admin_token_file))
    for verb in (("top", "--once"), ("status", *token)):
        assert main([verb[0], service.target, *verb[1:], "--json"]) == 0
        assert [host["num_threads"] for host in json.loads(capsys.readouterr().out)["hosts"]] == [1, 1]
        assert main([verb[0], service.target, *verb[1:]]) == 0
        assert re.search(r"\bthreads\b", capsys.readouterr().out)
    assert [host["num_threads"] for host in public_json(service.frontend.stats())["hosts"]] == [1, 1]
    assert b'"num_threads", "label": "threads"' in load_document().body


def test_live_until_interrupted(service: ServiceHarness) -> None:
    """As a user runs it: pictures keep coming, with rates of the latest interval, and Ctrl-C ends it with 130."""
    command = [sys.executable, "-c", "from moeserve.cli.app import entry; entry()", "top", service.target, "--json", "--interval-s", "0.05"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
    assert process.stdout is not None
    first, second = (json.loads(process.stdout.readline()) for _ in range(2))
    assert second["uptime_s"] > first["uptime_s"]
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "")


def test_no_service_and_nonsense(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "127.0.0.1:1", "--once"]) == 3
    assert main(["top", "127.0.0.1:1"]) == 3
    assert main(["top", "127.0.0.1:1", "--interval-s", "0"]) == 2
    assert "--interval-s is 0; allowed: more than 0" in capsys.readouterr().err


def snapshot(tokens: int, uptime_s: float, num_experts: int = 4, num_layers: int = 2, up: bool = True) -> ServiceStats:
    counts = [tokens * (expert == 1) for expert in range(num_experts)]
    held = [HostShards(0, range(num_experts), [0] * num_experts)]
    layer = LayerStats("l", tokens, counts, [0] * num_experts, [1] * num_experts, 1, held, 0.75)
    host = HostStats("host-0", up, 3, weights_bytes=5 * 2**30, num_threads=6)
    return ServiceStats(1, [layer] * num_layers, [host], 17, uptime_s, changing="balance, step 2 of 5")


def test_rates_are_of_the_time_between_two_snapshots() -> None:
    text = shown(view("t:1", snapshot(700, 12.0), snapshot(100, 10.0), 80), 80)
    assert "600 tokens/s" in text and "in the last 2.0 s" in text
    assert re.search(r"0 l\s+700\s+300\s+0.0%\s+0.25\s+0.75\s+1 1:100%", text)
    assert "changing: balance, step 2 of 5" in " ".join(text.split())
    assert "60 tokens/s" in shown(view("t:1", snapshot(360, 12.0), None, 80), 80)
    assert "queue 17 tokens" in text and "5.0 GiB" in text


@pytest.mark.parametrize("before", [snapshot(701, 10.0), snapshot(100, 13.0), snapshot(100, 10.0, num_layers=3), snapshot(1, 1.0, 5)])
def test_what_another_frontend_has_counted_is_not_compared(before: ServiceStats) -> None:
    """As behind one address, where another one answers the next connection: it may have run for longer, and counted less."""
    assert shown(view("t:1", snapshot(700, 12.0), before, 80), 80) == shown(view("t:1", snapshot(700, 12.0), None, 80), 80)


def test_a_lost_host_stands_out() -> None:
    assert "DOWN" in shown(view("t:1", snapshot(1, 1.0, up=False), None, 80), 80)


def test_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    """The heat map can be read without colour, by the height of its blocks."""
    picture = view("t:1", snapshot(100, 1.0), None, 80)
    assert "38;2;" in shown(picture, 80, force_terminal=True, color_system="truecolor")
    monkeypatch.setenv("NO_COLOR", "1")
    plain = shown(picture, 80, force_terminal=True, color_system="truecolor")
    assert "38;2;" not in plain and "38;5" not in plain
    assert "···███······" in plain


@pytest.mark.parametrize("num_experts", [1, 60, 512])
def test_any_number_of_experts_fits(num_experts: int) -> None:
    text = shown(view("t:1", snapshot(100, 1.0, max(2, num_experts)), None, 80), 80)
    assert max(map(len, text.splitlines())) <= 80
    assert ("hottest of 7 per block" in " ".join(text.split())) == (num_experts == 512)


def test_a_low_terminal_says_what_it_leaves_out() -> None:
    text = shown(view("t:1", snapshot(100, 1.0, num_layers=60), None, 80, 40), 80)
    assert len(text.splitlines()) <= 40 and "and 51 more layers: --once shows all" in text
