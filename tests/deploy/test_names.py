"""Dashboard, alerts and documents name what there is; nothing needs to be installed for this."""

from __future__ import annotations

import re

import pytest

from moeserve.observe.call_times import METHODS
from tests.deploy.files import DEPLOY, REPOSITORY, Query, alerts, dashboard, panels, rules, series


@pytest.mark.parametrize("query", [*panels(), *alerts()], ids=str)
def test_every_metric_exists(query: Query) -> None:
    named = set(re.findall(r"moeserve_\w+", query.expression))
    assert named <= series()
    assert named or query.name == "MoeserveDown"
    assert "$" not in query.expression


def test_the_dashboard_shows_every_metric() -> None:
    shown = set(re.findall(r"moeserve_\w+", " ".join(query.expression for query in panels())))
    ends = r"_(total|bucket|sum|count)$"
    assert {re.sub(ends, "", name) for name in shown} == {re.sub(ends, "", name) for name in series()}


@pytest.mark.parametrize("query", [*panels(), *alerts()], ids=str)
def test_what_every_frontend_sees_is_not_added_up(query: Query) -> None:
    seen = r"host_(restarts|state|up|busy|balancedness)|hosts_|rebalances|moved_|expert_(uses|loads|copies)|placement_"
    assert not re.search(rf"sum( by \([^)]*\) )?\(((increase|rate)\()?moeserve_({seen})", query.expression)


@pytest.mark.parametrize("query", panels(), ids=str)
def test_latencies_are_those_of_all_calls_that_run_tokens(query: Query) -> None:
    for methods in re.findall(r'method=~"([^"]*)"', query.expression):
        assert {method for method in (*METHODS, "GetStats", "ModelMetadata") if re.fullmatch(methods, method)} == METHODS


def test_variables_ask_for_labels_of_metrics_that_exist() -> None:
    variables = {variable["name"]: variable for variable in dashboard()["templating"]["list"]}
    assert set(variables) == {"datasource", "job", "layer"}
    for name in ("job", "layer"):
        query = variables[name]["query"]["query"]
        assert variables[name]["definition"] == query and query.endswith(f", {name})")
        assert set(re.findall(r"moeserve_\w+", query)) <= series()


def test_panels_lie_side_by_side() -> None:
    cells: set[tuple[int, int]] = set()
    found = dashboard()["panels"]
    for panel in found:
        at = panel["gridPos"]
        taken = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24 and not taken & cells, panel["title"]
        cells |= taken
    assert len({panel["id"] for panel in found}) == len(found)


def test_operations_say_of_every_alert_what_to_do() -> None:
    text = (REPOSITORY / "docs" / "operations.md").read_text()
    assert re.findall(r"^### (Moeserve\w+)$", text, re.M) == [rule["alert"] for rule in rules()]
    for rule in rules():
        assert rule["annotations"]["runbook"] == f"docs/operations.md#{rule['alert'].lower()}"
        section = text.split(f"### {rule['alert']}\n")[1].split("\n#")[0]
        assert "**Meaning.**" in section and "**Action.**" in section, rule["alert"]


def test_nothing_names_a_place_outside() -> None:
    """What is fetched from where is the reader's choice."""
    for path in [*DEPLOY.rglob("*"), REPOSITORY / ".dockerignore"]:
        if path.is_file():
            hosts = set(re.findall(r"https?://([\w.-]+)", path.read_text()))
            assert hosts <= {"127.0.0.1", "prometheus"}, path
