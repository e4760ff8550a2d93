"""Every expression of dashboard and alerts in a real Prometheus that scrapes a running service."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from moeserve import Client, InvalidRequest
from moeserve.observe.page import StatusPage
from moeserve.observe.summary import balancedness, demand
from tests.deploy.files import Query, alerts, panels
from tests.deploy.prometheus import Prometheus, prometheus
from tests.support.harness import ServiceHarness
from tests.support.waiting import until

LAYER = {"hidden_size": 16, "intermediate_size": 8, "num_experts": 8}
BROKEN = {"MoeserveExpertUnavailable", "MoeserveHostDown"}
#: alerts that the load is a reason for, and the layers that they tell of
REASONS = {"MoeserveDroppedTokens": {"tight"}, "MoeserveImbalanced": {"skewed"}}


@dataclass
class Watched:
    service: ServiceHarness
    prometheus: Prometheus
    #: when all was scraped that is asked for
    at: str
    #: alerts that were pending while a host was down
    while_down: set[str]

    def ask(self, expression: str) -> list[tuple[dict[str, str], float]]:
        return self.prometheus.ask(expression, time=self.at)


def load(service: ServiceHarness) -> None:
    """Layer `tight` drops, of `skewed` one expert gets everything; one call is refused."""
    one = torch.zeros(64, 1, dtype=torch.int64)
    with Client(service.target) as client:
        for _ in range(5):
            client.forward(torch.randn(64, 16), layer="tight")
            client.forward(torch.randn(64, 16), layer="skewed", topk_ids=one, topk_weights=one.float() + 1)
        with pytest.raises(InvalidRequest):
            client.forward(torch.randn(1, 3), layer="tight")


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    config = {
        "layers": [
            {**LAYER, "name": "tight", "gating": {"top_k": 2, "capacity_factor": 0.75}},
            {**LAYER, "name": "skewed", "gating": {"top_k": 1}, "identity_experts": 1, "zero_experts": 1},
        ],
        "placement": {"num_hosts": 3, "memory_per_host_bytes": 3 * 3 * 16 * 8 * 4},
        "store": {"spill": "disk"},
    }
    with ServiceHarness(config, "local", tmp_path_factory.mktemp("s")) as service:
        page = StatusPage("127.0.0.1", 0, service.metrics.registry, service.frontend.stats)
        try:
            with prometheus(tmp_path_factory.mktemp("prometheus"), page.port) as server:
                server.has_seen(2)
                load(service)  # a series that first appears with a count has no rate yet
                server.has_seen(1)
                load(service)
                while_down = lose_and_regain(service, server)
                service.call(service.controller.rebalance(dry_run=False))
                service.call(service.controller.scale(2))
                server.has_seen(2)
                yield Watched(service, server, server.well_at(), while_down)
        finally:
            page.stop()


def lose_and_regain(service: ServiceHarness, server: Prometheus) -> set[str]:
    def pending() -> set[str]:
        return {alert["labels"]["alertname"] for alert in server.get("alerts")["alerts"]}

    service.hosts[2].stop()
    found = until(lambda: found if (found := pending()) >= BROKEN | REASONS.keys() else set())
    service.hosts[2].start()
    until(lambda: server.ask("sum(moeserve_host_up)") == [({}, 3.0)])
    return found


@pytest.mark.parametrize("query", panels(), ids=str)
def test_every_panel_has_numbers(query: Query, watched: Watched) -> None:
    found = watched.ask(query.expression)
    assert found
    assert all(math.isfinite(value) for _, value in found), found


def value(watched: Watched, title: str) -> float:
    """The number on a panel that has one."""
    (query,) = (query for query in panels() if query.name == f"{title} A")
    ((_, number),) = watched.ask(query.expression)
    return number


def test_tiles_say_what_the_service_counted(watched: Watched) -> None:
    layers = watched.service.frontend.stats().layers
    lost = sum(int(layer.dropped.sum()) for layer in layers)
    asked = sum(sum(demand(layer)) for layer in layers)
    assert lost and value(watched, "Dropped") == pytest.approx(lost / asked)
    assert value(watched, "Balance of the worst layer") == pytest.approx(min(balancedness(demand(layer)) for layer in layers)) == 1 / 8
    assert 0 < value(watched, "p50") <= value(watched, "p99")
    assert (value(watched, "Queue"), value(watched, "Hosts down"), value(watched, "Experts without a live copy")) == (0, 0, 0)


def test_the_epoch_is_that_of_the_latest_placement(watched: Watched) -> None:
    epoch = watched.service.controller.state.release.epoch
    assert value(watched, "Epoch of the placement, hosts wanted") == watched.service.frontend.stats().epoch == epoch > 1


def test_the_heat_map_has_a_cell_per_layer_and_expert(watched: Watched) -> None:
    (query,) = (query for query in panels() if query.name.startswith("Load per expert"))
    found = {(labels["layer"], int(labels["expert"])): number for labels, number in watched.ask(query.expression)}
    layers = watched.service.frontend.stats().layers
    expected = {
        (layer.name, expert): count / (sum(demand(layer)) / len(demand(layer)))
        for layer in layers
        for expert, count in enumerate(demand(layer))
    }
    assert found == pytest.approx(expected)
    assert found["skewed", 0] == pytest.approx(8) and found["skewed", 1] == 0


@pytest.mark.parametrize("query", alerts(), ids=str)
def test_every_alert_can_be_asked_and_answers_when_there_is_reason(query: Query, watched: Watched) -> None:
    found = watched.ask(query.expression)
    assert {labels.get("layer") for labels, _ in found} == REASONS.get(query.name, set())
    assert (query.name in watched.while_down) == (query.name in BROKEN | REASONS.keys())


def test_rules_were_evaluated_without_an_error(watched: Watched) -> None:
    (group,) = watched.prometheus.get("rules")["groups"]
    assert {(rule["health"], rule.get("lastError", "")) for rule in group["rules"]} == {("ok", "")}
    assert len(group["rules"]) == len(alerts())
