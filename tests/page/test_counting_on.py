"""Whether a snapshot goes on where another was: `moeserve top` and the page say the same of any two."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from importlib.resources import files
from itertools import product

import pytest

from moeserve.observe.page.endpoint import public_json
from moeserve.observe.stats import Durations, LayerStats, ServiceStats
from moeserve.observe.summary import counts_on


def snapshot(
    uptime_s: float = 2.0, asked: tuple[int, ...] = (2, 2), tokens: int = 4, calls: tuple[int, ...] = (1, 1), name: str = "l"
) -> ServiceStats:
    layer = LayerStats(name, tokens, asked, [0] * len(asked), [1] * len(asked))
    return ServiceStats(1, [layer], [], 0, uptime_s, requests=[Durations("Forward", (1.0,), calls, 1.0)])


SNAPSHOTS = {
    "first": snapshot(),
    "later": snapshot(3.0, (3, 2), 5, (2, 1)),
    "shorter": snapshot(1.0),
    "fewer rows of an expert": snapshot(3.0, (9, 1), 10, (9, 9)),
    "fewer tokens": snapshot(3.0, (9, 9), 3, (9, 9)),
    "fewer calls": snapshot(3.0, (9, 9), 18, (0, 9)),
    "other buckets": snapshot(3.0, (9, 9), 18, (9, 9, 9)),
    "no calls": replace(snapshot(3.0, (9, 9), 18), requests=[]),
    "other experts": snapshot(3.0, (9, 9, 9), 27, (9, 9)),
    "another layer": snapshot(3.0, (9, 9), 18, (9, 9), "k"),
    "two layers": replace(snapshot(3.0), layers=[*snapshot().layers, *snapshot().layers]),
}


@pytest.mark.parametrize("name", SNAPSHOTS)
def test_nothing_that_is_counted_becomes_less(name: str) -> None:
    assert counts_on(SNAPSHOTS[name], SNAPSHOTS["first"]) == (name in ("first", "later"))


def test_the_page_says_the_same() -> None:
    if (node := shutil.which("node")) is None:
        pytest.skip("node is not installed: it is needed to run what a browser runs")
    script = (files("moeserve.observe.page") / "page.js").read_text("utf-8")
    functions = script[script.index("function countsOn") : script.index("function shares")]
    pairs = list(product(SNAPSHOTS.values(), repeat=2))
    told = json.dumps([[public_json(one) for one in pair] for pair in pairs])
    run = f"{functions}\nconsole.log(JSON.stringify({told}.map((pair) => countsOn(...pair))))"
    found = subprocess.run([node, "-"], input=run, capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(found.stdout) == [counts_on(*pair) for pair in pairs]
