"""What deploy/ holds, read as the programs read it that use it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from moeserve.observe.metrics import Metrics

REPOSITORY = Path(__file__).parents[2]
DEPLOY = REPOSITORY / "deploy"
ALERTS = DEPLOY / "prometheus" / "alerts.yml"
#: what Grafana puts in the place of its variables when all of everything is shown
GRAFANA = {"$__rate_interval": "5m", "$job": ".*", "$layer": ".*"}


@dataclass(frozen=True)
class Query:
    """One expression as Prometheus is asked it."""

    name: str
    expression: str

    def __str__(self) -> str:
        return self.name


class _Loader(yaml.SafeLoader):
    """YAML with the tag of compose that replaces what another file says."""


_Loader.add_constructor("!override", lambda loader, node: loader.construct_sequence(node))


def read_yaml(path: Path) -> Any:
    return yaml.load(path.read_text(), _Loader)


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DEPLOY / "grafana" / "dashboards" / "moeserve.json").read_text())
    return found


def panels() -> list[Query]:
    """Every query of the dashboard."""
    queries = []
    for panel in dashboard()["panels"]:
        for target in panel["targets"]:
            expression = target["expr"]
            for variable, value in GRAFANA.items():
                expression = expression.replace(variable, value)
            queries.append(Query(f"{panel['title']} {target['refId']}", expression))
    return queries


def rules() -> list[dict[str, Any]]:
    return [rule for group in read_yaml(ALERTS)["groups"] for rule in group["rules"]]


def alerts() -> list[Query]:
    """Every alert's expression."""
    return [Query(rule["alert"], rule["expr"]) for rule in rules()]


SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}


def series() -> set[str]:
    """Every name that a scrape can have, from the registry itself."""
    return {family.name + suffix for family in Metrics([]).registry.collect() for suffix in SUFFIXES[family.type]}
