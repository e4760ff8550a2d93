"""Every alert fires when it should and is silent when all is well, said by promtool, which runs them over made-up series."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.files import ALERTS, DEPLOY, rules

AT = 'job="moeserve", instance="a:9464"'
#: of a service that is well and busy, a value a minute: from + step x count
WELL = {
    f"up{{{AT}}}": "1x60",
    f'moeserve_host_up{{{AT}, host="host-0"}}': "1x60",
    f"moeserve_hosts_failing{{{AT}}}": "0x60",
    f"moeserve_hosts_missing{{{AT}}}": "0x50 2x10",
    f"moeserve_host_restarts_total{{{AT}}}": "0x20 1x40",
    f'moeserve_expert_copies{{{AT}, layer="l", expert="0", state="live"}}': "1x60",
    f'moeserve_expert_tokens_total{{{AT}, layer="l", expert="0"}}': "0+600x60",
    f'moeserve_expert_tokens_total{{{AT}, layer="l", expert="1"}}': "0+1200x60",
    f'moeserve_expert_dropped_tokens_total{{{AT}, layer="l", expert="0", reason="capacity"}}': "0+6x60",
    f'moeserve_requests_total{{{AT}, method="Forward", code="OK"}}': "0+600x60",
    f'moeserve_requests_total{{{AT}, method="Forward", code="UNAVAILABLE"}}': "0+1x60",
    f'moeserve_requests_total{{{AT}, method="Forward", code="RESOURCE_EXHAUSTED"}}': "5x60",
    f'moeserve_stage_duration_seconds_bucket{{{AT}, stage="queue", le="0.1"}}': "0+600x60",
    f'moeserve_stage_duration_seconds_bucket{{{AT}, stage="queue", le="2.5"}}': "0+600x60",
    f'moeserve_stage_duration_seconds_bucket{{{AT}, stage="queue", le="+Inf"}}': "0+600x60",
    f"moeserve_placement_epoch{{{AT}}}": "1x60",
    f'moeserve_rebalances_total{{{AT}, outcome="failed"}}': "0x40 1x20",
    f'moeserve_rebalances_total{{{AT}, outcome="unchanged"}}': "0+1x60",
    'moeserve_placement_epoch{job="moeserve", instance="b:9464"}': "1x60",
}
BY_LAYER = {"job": "moeserve", "layer": "l"}
HERE = {"job": "moeserve", "instance": "a:9464"}


@dataclass(frozen=True)
class Sick:
    """How the series differ from those of a service that is well (None = are missing), and the alert that comes of it."""

    series: Mapping[str, str | None]
    labels: Mapping[str, str]
    summary: str


SICK = {
    "MoeserveDown": Sick({f"up{{{AT}}}": "0x60"}, HERE, "a:9464 does not answer on its metrics port"),
    "MoeserveNotReady": Sick(
        {f'moeserve_host_up{{{AT}, host="host-0"}}': None, f'moeserve_expert_copies{{{AT}, layer="l", expert="0", state="live"}}': "0x60"},
        HERE,
        "a:9464 runs, but has not reached any of its hosts yet",
    ),
    "MoeserveExpertUnavailable": Sick(
        {f'moeserve_expert_copies{{{AT}, layer="l", expert="0", state="live"}}': "1x10 0x50"},
        {**HERE, "layer": "l"},
        "1 experts of l have no live copy, according to a:9464",
    ),
    "MoeserveHostDown": Sick(
        {f'moeserve_host_up{{{AT}, host="host-0"}}': "1x10 0x50"}, {**HERE, "host": "host-0"}, "a:9464 has lost its connection to host-0"
    ),
    "MoeserveHostFailing": Sick({f"moeserve_hosts_failing{{{AT}}}": "0x10 2x50"}, HERE, "2 hosts cannot be restarted, according to a:9464"),
    "MoeserveHostsMissing": Sick(
        {f"moeserve_hosts_missing{{{AT}}}": "0x40 2x20"},
        {"job": "moeserve"},
        "moeserve should have 2 hosts more than its nodes have room for",
    ),
    "MoeserveHostRestarts": Sick(
        {f"moeserve_host_restarts_total{{{AT}}}": "0x45 1+1x14"}, HERE, "hosts restarted 15 times in 15 minutes, according to a:9464"
    ),
    "MoeserveRequestsFail": Sick(
        {f'moeserve_requests_total{{{AT}, method="Forward", code="UNAVAILABLE"}}': "0+200x60"},
        {"job": "moeserve", "method": "Forward"},
        "25% of Forward calls fail",
    ),
    "MoeserveOverloaded": Sick(
        {f'moeserve_requests_total{{{AT}, method="Forward", code="RESOURCE_EXHAUSTED"}}': "0+120x60"},
        {"job": "moeserve", "method": "Forward"},
        "2 Forward calls per second are refused",
    ),
    "MoeserveQueueWait": Sick(
        {f'moeserve_stage_duration_seconds_bucket{{{AT}, stage="queue", le="0.1"}}': "0x60"},
        {"job": "moeserve"},
        "one batch in a hundred waits 2.476s before it runs",
    ),
    "MoeserveDroppedTokens": Sick(
        {f'moeserve_expert_dropped_tokens_total{{{AT}, layer="l", expert="0", reason="capacity"}}': "0+600x60"},
        BY_LAYER,
        "25% of the choices of l are not computed",
    ),
    "MoeserveImbalanced": Sick(
        {f'moeserve_expert_tokens_total{{{AT}, layer="l", expert="{expert}"}}': "0x60" for expert in range(1, 5)},
        BY_LAYER,
        "the busiest expert of l computes more than four times the mean (balance 0.20)",
    ),
    "MoeservePlacementStale": Sick(
        {f"moeserve_placement_epoch{{{AT}}}": "1x10 3x50"}, {"job": "moeserve"}, "frontends of moeserve are 2 epochs apart"
    ),
    "MoeserveBalancingStopped": Sick(
        {
            f'moeserve_rebalances_total{{{AT}, outcome="failed"}}': "0x10 1+1x49",
            f'moeserve_rebalances_total{{{AT}, outcome="unchanged"}}': "0+1x10 10x50",
        },
        {"job": "moeserve"},
        "no round of balancing of moeserve has ended well for half an hour",
    ),
}


def promtool(*arguments: object) -> None:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("promtool is not installed: it comes with Prometheus (Debian: apt-get install prometheus)")
    done = subprocess.run([found, *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def run(folder: Path, changes: Mapping[str, str | None], expected: Mapping[str, list[dict[str, Any]]]) -> None:
    """At the end of the hour exactly the `expected` alerts fire."""
    given = [{"series": name, "values": values} for name, values in {**WELL, **changes}.items() if values is not None]
    asked = [{"eval_time": "1h", "alertname": name, "exp_alerts": found} for name, found in expected.items()]
    test = {"interval": "1m", "input_series": given, "alert_rule_test": asked}
    (folder / "test.yml").write_text(yaml.safe_dump({"rule_files": [str(ALERTS)], "evaluation_interval": "1m", "tests": [test]}))
    promtool("test", "rules", folder / "test.yml")


def test_the_files_are_valid() -> None:
    promtool("check", "rules", ALERTS)
    promtool("check", "config", DEPLOY / "prometheus" / "prometheus.yml")


def test_every_alert_is_tried_here() -> None:
    assert list(SICK) == [rule["alert"] for rule in rules()]


def test_nothing_fires_while_all_is_well(tmp_path: Path) -> None:
    run(tmp_path, {}, {name: [] for name in SICK})


@pytest.mark.parametrize("name", SICK)
def test_it_fires_alone(name: str, tmp_path: Path) -> None:
    sick, rule = SICK[name], next(rule for rule in rules() if rule["alert"] == name)
    annotations = {"summary": sick.summary, "runbook": rule["annotations"]["runbook"]}
    fires = [{"exp_labels": {**sick.labels, **rule["labels"]}, "exp_annotations": annotations}]
    run(tmp_path, sick.series, {other: fires if other == name else [] for other in SICK})
