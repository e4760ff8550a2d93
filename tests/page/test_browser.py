"""The page in a real browser: the numbers it shows are the service's."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from html.parser import HTMLParser
from itertools import chain, repeat
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from moeserve.observe.page import StatusPage
from moeserve.observe.stats import LayerStats, ServiceStats
from moeserve.observe.summary import balancedness, demand, host_shares
from tests.page.loaded import NUM_EXPERTS, TOKENS, Loaded

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
VOID = {"meta", "link", "input", "col", "br"}


class Element:
    def __init__(self, tag: str, attributes: dict[str, str | None]) -> None:
        self.tag, self.attributes = tag, attributes
        self.children: list[Element | str] = []

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children if _is_seen(child))

    def all(self, tag: str) -> list[Element]:
        inner = [child for child in self.children if isinstance(child, Element)]
        return [found for child in inner for found in ([child] if child.tag == tag else []) + child.all(tag)]

    def by_id(self, name: str) -> Element:
        return next(
            found
            for tag in ("p", "div", "table", "ol", "strong", "span", "section")
            for found in self.all(tag)
            if found.attributes.get("id") == name
        )

    def rows(self) -> list[list[str]]:
        return [[cell.text for cell in row.all("td")] for row in self.all("tbody")[0].all("tr")]


def _is_seen(child: Element | str) -> bool:
    return isinstance(child, str) or child.tag not in ("title", "script", "style")


class Tree(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.open = [Element("document", {})]
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, dict(attrs))
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def browsed(url: str, folder: Path) -> tuple[Element, str]:
    """The document after a few of its updates, and what the browser logged."""
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser is installed: one of {', '.join(BROWSERS)} is needed to look at the page")
    command = [found, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=4000", "--dump-dom"]
    done = subprocess.run(
        [*command, f"--user-data-dir={folder}", url],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return Tree(done.stdout).open[0], done.stderr


@pytest.fixture(scope="module")
def shown(loaded: Loaded, tmp_path_factory: pytest.TempPathFactory) -> tuple[Element, str]:
    return browsed(loaded.url, tmp_path_factory.mktemp("browser"))


def test_nothing_was_refused_by_the_policy_and_nothing_failed(shown: tuple[Element, str]) -> None:
    assert not re.findall(r".*CONSOLE.*", shown[1])


def test_numbers_of_the_load(shown: tuple[Element, str], loaded: Loaded) -> None:
    page, stats = shown[0], loaded.service.frontend.stats()
    first, second = page.by_id("load").rows()
    wanted = demand(stats.layers[0])
    most = max(wanted)
    dropped = 100 * int(stats.layers[0].dropped.sum()) / sum(wanted)
    hottest = f"{wanted.index(most)}: {100 * most / sum(wanted):.0f} %"
    even = [f"{balancedness(wanted):.2f}", f"{stats.layers[0].host_balancedness:.2f}"]
    assert [first[0], first[2], *first[4:]] == ["first", f"{TOKENS:,}", f"{dropped:.1f} %", *even, "0–1", hottest]
    assert [second[0], second[2], *second[4:]] == ["<b>second</b>", "0", "0.0 %", "1.00", "–", "0–1", "–"]
    assert page.by_id("dropped").text == f"{dropped:.1f} %"
    assert page.by_id("balance").text == f"{balancedness(wanted):.2f}"
    assert page.by_id("queue").text == "0"


def test_the_heat_map_says_the_load_of_every_expert(shown: tuple[Element, str], loaded: Loaded) -> None:
    layer = loaded.service.frontend.stats().layers[0]
    strip = shown[0].by_id("load").all("svg")[0]
    titles = {title.children[0] for title in strip.all("title")}
    asked = demand(layer)
    assert len(titles) == NUM_EXPERTS
    for expert in range(NUM_EXPERTS):
        lost, share = int(layer.dropped[expert]), asked[expert] * NUM_EXPERTS / sum(asked)
        copies = ("0 live copies", "1 live copy")[layer.live_copies[expert]]
        said = f"expert {expert}: {asked[expert]:,} asked, {lost:,} dropped, {share:.2f} of its share, {copies}"
        assert said in titles
    label = strip.attributes["aria-label"] or ""
    assert strip.attributes["role"] == "img" and f"hottest expert {asked.index(max(asked))} with" in label
    fills = {rect.attributes.get("style") or "" for rect in strip.all("rect") if rect.attributes.get("class") != "lost"}
    assert len(fills) > 1 and all("color-mix" in fill for fill in fills)


def test_hosts_and_what_they_hold(shown: tuple[Element, str], loaded: Loaded) -> None:
    page, placement = shown[0], loaded.service.placement.layers[0]
    table = page.by_id("hosts")
    assert [row[0] for row in table.rows()] == ["host-0", "host-1", "host-2 is down"]
    shares = host_shares(stats := loaded.service.frontend.stats().layers, [demand(layer) for layer in stats])
    assert [row[-2] for row in table.rows()] == [f"{100 * shares[number]:.1f} %" for number in range(3)]
    for number, strip in enumerate(table.all("svg")):
        held = placement.shards_on(number)
        names = ", ".join(f"{one.expert} (shard {one.shard + 1} of 2)" for one in held)
        assert strip.attributes["aria-label"] == f"host-{number} holds experts {names} of first"
        kinds = [rect.attributes.get("class") for rect in strip.all("rect")]
        assert kinds.count("gone" if number == 2 else "held") == len(held)
    gone = sorted({one.expert for one in placement.shards_on(2)})
    assert page.by_id("copies").text == f"no live copy of expert {', '.join(map(str, gone))}"
    assert page.by_id("up").text == "2 / 3" and page.by_id("state").text == "1 of 3 hosts down"


def test_latency_answers_and_events(shown: tuple[Element, str]) -> None:
    page = shown[0]
    latency = {row[0]: row[1:] for row in page.by_id("latency").rows()}
    assert latency["Forward"][0] == "3" and latency["experts"][0] == "2"
    p50, p90, p99 = (float(value) for value in latency["Forward"][1:])
    assert 0 < p50 <= p90 <= p99
    assert ["Forward", "OK", "2"] in page.by_id("calls").rows() and ["Forward", "INVALID_ARGUMENT", "1"] in page.by_id("calls").rows()
    assert re.sub(r"^[\d:]+", "", page.by_id("events").all("li")[0].text) == "host lost: host-2"


def test_layers_of_another_service_have_its_names(tmp_path: Path) -> None:
    """It has taken the place of the first one, at the same address."""
    names = chain(["a"], repeat("b"))
    page = StatusPage(
        "127.0.0.1", 0, CollectorRegistry(), lambda: ServiceStats(1, [LayerStats(next(names), 0, [0], [0], [1])], [], 0, time.monotonic())
    )
    try:
        document, _ = browsed(f"http://127.0.0.1:{page.port}", tmp_path)
    finally:
        page.stop()
    assert [option.text for option in document.all("option")] == ["b"]


def test_the_package_ships_the_page() -> None:
    import tomllib

    data = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["moeserve"]
    folder = Path(__file__).parents[2] / "moeserve"
    shipped = {path for pattern in data for path in folder.glob(pattern)}
    assert {path for path in (folder / "observe" / "page").iterdir() if path.suffix in (".html", ".css", ".js")} <= shipped
