"""What a scraper reads is what prometheus_client would have written, in every format it knows."""

from __future__ import annotations

import gzip
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from urllib.parse import urlencode
from urllib.request import Request, urlopen

import pytest
import torch
from prometheus_client.exposition import choose_encoder
from prometheus_client.parser import text_string_to_metric_families

from moeserve.config import GatingConfig, LayerSpec
from moeserve.observe.metrics import Metrics
from moeserve.observe.page import StatusPage
from moeserve.observe.page.exposition import expose

NAMES = ("layers.0", 'a "quoted" \\ one', 'expert="",layer="', "two\nlines", "100 %d 0.0", "\u2028 \x85 \x0b Schicht für Experten", "{}")
FORMATS = (
    "",
    "*/*",
    "text/plain; version=1.0.0; escaping=underscores",
    "text/plain; version=1.0.0; escaping=allow-utf-8",
    "text/plain; version=1.0.0; escaping=dots",
    "application/openmetrics-text",
    "application/openmetrics-text; version=1.0.0; escaping=values",
    "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,text/plain;version=0.0.4;q=0.5",
)


def specs(names: Iterable[str], num_experts: int) -> list[LayerSpec]:
    return [LayerSpec(name, 8, 8, num_experts, "swiglu", False, "float32", GatingConfig(), identity_experts=1) for name in names]


def loaded(metrics: Metrics, num_layers: int, num_experts: int) -> Metrics:
    """The first layer has nothing to tell, the last has more than float64 tells apart."""
    for layer in range(1, num_layers):
        computed, dropped = torch.arange(num_experts) * 10**layer, torch.arange(num_experts) % 3
        metrics.experts.add(layer, 1000 * layer, computed, {"capacity": dropped})
        metrics.experts.live_copies[layer] += 2
    metrics.experts.add(num_layers - 1, 1, torch.full((num_experts,), 2**60), {"capacity": torch.zeros(num_experts, dtype=torch.int64)})
    metrics.observe_call("Forward", "OK", 0.02)
    metrics.host_states.labels("host-0").set(True, "up")
    metrics.aux_loss.labels(NAMES[1]).set(float("nan"))
    return metrics


@pytest.fixture(scope="module", params=["full", "top", "off"])
def served(request: pytest.FixtureRequest) -> Iterator[tuple[Metrics, str]]:
    """Metrics, and where they are scraped."""
    metrics = loaded(Metrics(specs(NAMES, 40), request.param), len(NAMES), 40)
    page = StatusPage("127.0.0.1", 0, metrics.registry, lambda: pytest.fail("nobody asks"))
    yield metrics, f"http://127.0.0.1:{page.port}/metrics"
    page.stop()


def scrape(url: str, **headers: str) -> tuple[str, bytes]:
    with urlopen(Request(url, headers=headers), timeout=30) as answer:
        body = answer.read()
        return answer.headers["Content-Type"], gzip.decompress(body) if answer.headers["Content-Encoding"] == "gzip" else body


def told(body: bytes) -> list[tuple[str, str]]:
    """Every line, and apart from it the number at its end: the library writes 5 as 5.0."""
    lines = [line.rpartition(" ") for line in body.decode().split("\n")]
    return [(text, number if text.startswith("#") or not text else repr(float(number))) for text, _, number in lines]


@pytest.mark.parametrize("accept", FORMATS)
@pytest.mark.parametrize("encoding", ["identity", "gzip"])
def test_a_scrape_says_what_the_library_says(served: tuple[Metrics, str], accept: str, encoding: str) -> None:
    metrics, url = served
    encode, content_type = choose_encoder(accept)
    said, body = scrape(url, **{"Accept": accept, "Accept-Encoding": encoding})
    assert said == content_type
    assert told(body) == told(encode(metrics.registry))


def test_only_the_series_that_are_asked_for(served: tuple[Metrics, str]) -> None:
    metrics, url = served
    names = {"moeserve_expert_tokens_total", "moeserve_tokens_total", "moeserve_host_up", "moeserve_request_duration_seconds_sum", "x"}
    _, body = scrape(f"{url}?{urlencode({'name[]': sorted(names)}, doseq=True)}")
    found = {sample.name for family in text_string_to_metric_families(body.decode()) for sample in family.samples}
    detail = {sample.name for family in metrics.registry.collect() for sample in family.samples}
    assert found == names & detail


def test_prometheus_own_checker_takes_it(served: tuple[Metrics, str]) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed")
    done = subprocess.run(["promtool", "check", "metrics"], input=scrape(served[1])[1], capture_output=True, timeout=60, check=False)
    assert b"error" not in done.stderr.lower(), done.stderr


def test_many_experts_cost_a_scrape_a_fraction_of_what_the_library_takes() -> None:
    """Of the interpreter's time, which requests wait for; a tenth where it was measured."""
    metrics = loaded(Metrics(specs(map(str, range(30)), 256), "full"), 18, 256)

    def cost_s(write: Callable[[], object]) -> float:
        began = time.thread_time()
        write()
        return time.thread_time() - began

    of_library = min(cost_s(lambda: choose_encoder("")[0](metrics.registry)) for _ in range(3))
    assert min(cost_s(lambda: expose(metrics.registry, "")) for _ in range(3)) < of_library / 3
