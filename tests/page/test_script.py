"""The page's script without a browser: what it keeps, and what it makes of it."""

from __future__ import annotations

import json
import shutil
import subprocess
from importlib.resources import files
from typing import Any

import pytest

from moeserve.observe.call_times import METHODS

#: stands in for every element, and for what can be asked of it
ANYTHING = """
const anything = new Proxy(function () {}, {
  get: (_, key) => key === Symbol.toPrimitive ? () => "" : anything, set: () => true, apply: () => anything,
});
globalThis.document = anything;
"""
SCRIPT = (files("moeserve.observe.page") / "page.js").read_text("utf-8")
WORKED_OUT = SCRIPT[: SCRIPT.index("// ---- drawing")]


def run(script: str) -> Any:
    if (node := shutil.which("node")) is None:
        pytest.skip("node is not installed: it is needed to run what a browser runs")
    return json.loads(subprocess.run([node, "-"], input=script, capture_output=True, text=True, timeout=60, check=True).stdout)


def kept(uptimes_s: list[float]) -> tuple[list[float], float]:
    """The times of what the page keeps, and the one that rates count from."""
    snapshots = json.dumps([{"uptime_s": at_s, "layers": [], "requests": [], "stages": []} for at_s in uptimes_s])
    told = "console.log(JSON.stringify([history.map((one) => one.uptime_s), lately().uptime_s]))"
    history, since = run(f"{WORKED_OUT}\n{snapshots}.forEach(remember);\n{told}")
    return history, since


def test_a_minute_is_a_minute_also_after_a_page_was_hidden() -> None:
    """Browsers wake a hidden page once a minute."""
    every_second = [float(second) for second in range(100)]
    assert kept(every_second) == (every_second[-61:], 94.0)
    assert kept([0.0, 60.0, 120.0, 121.0, 122.0]) == ([120.0, 121.0, 122.0], 120.0)
    assert kept([0.0, 60.0]) == ([0.0, 60.0], 0.0)
    assert kept([5.0]) == ([5.0], 5.0)


def test_calls_of_both_protocols_count() -> None:
    requests = json.dumps([{"name": name} for name in (*METHODS, "GetStats", "ModelMetadata")])
    assert set(run(f"{WORKED_OUT}\nconsole.log(JSON.stringify(forwards({{requests: {requests}}}).map((one) => one.name)))")) == METHODS


def test_a_browser_that_keeps_nothing_shows_the_page() -> None:
    forbidden = 'Object.defineProperty(globalThis, "localStorage", { get() { throw new Error("forbidden"); } });'
    fetch = "globalThis.fetch = async (what) => { console.log(JSON.stringify(what)); process.exit(0); };"
    assert run(f"{ANYTHING}{forbidden}\n{fetch}\n{SCRIPT}") == "stats.json"
