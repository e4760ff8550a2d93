"""One scrape of several processes: what they count is added up, what all of them know is not."""

from __future__ import annotations

import time
from collections.abc import Iterator
from urllib.request import Request, urlopen

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from moeserve.config import GatingConfig, LayerSpec
from moeserve.observe.balancing import Balancing
from moeserve.observe.metrics import Metrics
from moeserve.observe.page import OtherProcesses, StatusPage

NAMES = ("a", "two\nlines", "\u2028 { } ")
Sample = tuple[str, tuple[tuple[str, str], ...]]


def metrics(calls: int) -> Metrics:
    made = Metrics([LayerSpec(name, 8, 8, 4, "swiglu", False, "float32", GatingConfig()) for name in NAMES], "full")
    for _ in range(calls):
        made.observe_call("Forward", "OK", 0.02)
        made.experts.add(1, 10, torch.arange(4), {"capacity": torch.ones(4, dtype=torch.int64)})
    made.queue_tokens.set(calls)
    made.placement_epoch.set(7)
    made.host_restarts.inc()
    made.host_states.labels("host-0").set(True, "up")
    made.host_states.labels("host-0").loads = 5, 2
    made.balancing.said = Balancing({"moved": 3}, 4, 6)
    made.aux_loss.labels(NAMES[0]).set(float("nan"))
    return made


class Several:
    def __init__(self, calls: list[int]) -> None:
        self.metrics = [metrics(number) for number in calls]
        self.targets: dict[str, str] = {}
        self.others = OtherProcesses(lambda: self.targets)
        self.pages = [StatusPage("127.0.0.1", 0, self.metrics[0].registry, lambda: pytest.fail("nobody asks"), self.others)]
        for number, one in enumerate(self.metrics[1:]):
            self.pages.append(StatusPage("127.0.0.1", 0, one.registry, lambda: pytest.fail("nobody asks")))
            self.targets[f"serve-{number}"] = f"127.0.0.1:{self.pages[-1].port}"

    def scrape(self, accept: str = "", query: str = "") -> dict[Sample, float]:
        request = Request(f"http://127.0.0.1:{self.pages[0].port}/metrics{query}", headers={"Accept": accept})
        with urlopen(request, timeout=30) as answer:
            body = answer.read().decode()
        assert body.count("# EOF") == ("openmetrics" in accept)
        families = text_string_to_metric_families(body.replace("# EOF\n", ""))
        return {(one.name, tuple(sorted(one.labels.items()))): one.value for family in families for one in family.samples}

    def close(self) -> None:
        for page in self.pages:
            page.stop()


@pytest.fixture
def several() -> Iterator[Several]:
    several = Several([1, 2, 4])
    yield several
    several.close()


REQUESTS: Sample = ("moeserve_requests_total", (("code", "OK"), ("method", "Forward")))


@pytest.mark.parametrize("accept", ["", "application/openmetrics-text; version=1.0.0"])
def test_counts_are_added_and_knowledge_is_not(several: Several, accept: str) -> None:
    said = several.scrape(accept)
    assert said[REQUESTS] == 7
    assert said[("moeserve_request_duration_seconds_bucket", (("le", "0.025"), ("method", "Forward")))] == 7
    assert said[("moeserve_expert_tokens_total", (("expert", "3"), ("layer", NAMES[1])))] == 21
    assert said[("moeserve_queue_tokens", ())] == 7
    assert said[("moeserve_placement_epoch", ())] == 7
    assert said[("moeserve_host_restarts_total", ())] == 1
    assert [said[(f"moeserve_expert_{what}_total", (("host", "host-0"),))] for what in ("uses", "loads")] == [5, 2]
    assert said[("moeserve_rebalances_total", (("outcome", "moved"),))] == 3
    assert [said[(f"moeserve_moved_{what}_total", ())] for what in ("experts", "bytes")] == [4, 6]


def test_a_series_of_another_process_alone_is_there_too(several: Several) -> None:
    several.metrics[1].observe_call("ForwardMany", "RESOURCE_EXHAUSTED", 0.1)
    said = several.scrape()
    labels = (("code", "RESOURCE_EXHAUSTED"), ("method", "ForwardMany"))
    assert said[("moeserve_requests_total", labels)] == 1
    created = several.scrape("application/openmetrics-text; version=1.0.0")[("moeserve_requests_created", labels)]
    assert created == pytest.approx(time.time(), abs=60)
    assert set(several.scrape(query="?name[]=moeserve_requests_total")) == {one for one in said if one[0] == REQUESTS[0]}


def test_what_an_ended_process_has_counted_stays(several: Several) -> None:
    several.scrape()
    several.pages[2].stop()
    assert several.scrape()[REQUESTS] == 7
    del several.targets["serve-1"]
    assert several.scrape()[REQUESTS] == 7
    for counted in (8, 9):
        several.pages.append(StatusPage("127.0.0.1", 0, metrics(1).registry, lambda: pytest.fail("nobody asks")))
        several.targets["serve-1"] = f"127.0.0.1:{several.pages[-1].port}"
        assert several.scrape()[REQUESTS] == counted


def test_nothing_is_queued_in_a_process_that_has_ended(several: Several) -> None:
    """Else a service would seem to be overloaded for ever, because a process of it was killed once."""
    assert several.scrape()[("moeserve_queue_tokens", ())] == 7
    several.pages[2].stop()
    assert several.scrape()[("moeserve_queue_tokens", ())] == 3
    del several.targets["serve-1"]
    assert several.scrape()[("moeserve_queue_tokens", ())] == 3
