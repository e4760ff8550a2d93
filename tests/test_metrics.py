"""What a scraper reads: names, labels and values, through Prometheus' own parser."""

from __future__ import annotations

from dataclasses import replace
from math import nan
from typing import get_args

import pytest
import torch
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from moeserve.config import GatingConfig, LayerSpec
from moeserve.observe.balancing import Balancing
from moeserve.observe.expert_counts import ExpertDetail
from moeserve.observe.metrics import Metrics, Stage

NUM_EXPERTS = 40
SPECS = [LayerSpec(f"layers.{index}", 8, 8, NUM_EXPERTS, "swiglu", False, "float32", GatingConfig()) for index in range(2)]
Labels = tuple[tuple[str, str], ...]


def scraped(metrics: Metrics) -> dict[str, dict[Labels, float]]:
    """Series name -> its labels, sorted -> value."""
    series: dict[str, dict[Labels, float]] = {}
    for family in text_string_to_metric_families(generate_latest(metrics.registry).decode()):
        for sample in family.samples:
            series.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return series


def busy(detail: ExpertDetail) -> Metrics:
    """Layer 0: expert e computed e + 1 pairs and dropped 1; layer 1: nothing yet. One of everything else."""
    metrics = Metrics(SPECS, detail)
    metrics.experts.add(0, 7, torch.arange(NUM_EXPERTS) + 1, {"capacity": torch.zeros(NUM_EXPERTS, dtype=torch.int64)})
    metrics.experts.add(0, 5, torch.zeros(NUM_EXPERTS, dtype=torch.int64), {"capacity": torch.ones(NUM_EXPERTS, dtype=torch.int64)})
    metrics.experts.live_copies[0] += 1
    metrics.observe_call("Forward", "OK", 0.02)
    for stage in get_args(Stage):
        metrics.observe_stage(stage, 0.001)
    metrics.batch_tokens.observe(12)
    metrics.queue_tokens.set(3)
    metrics.placement_epoch.set(2)
    metrics.host_states.labels("host-0").set(True, "up")
    metrics.host_states.labels("host-0").loads = (9, 4)
    metrics.host_queue_tokens.labels("host-0").set(4)
    metrics.host_restarts.inc()
    metrics.expert_retries.labels("host_lost").inc()
    metrics.messages.labels("ring").inc()
    metrics.aux_loss.labels("layers.0").set(1.5)
    metrics.balancing.said = Balancing({"moved": 1}, moved_experts=3, moved_bytes=96, balancedness=(0.9, nan))
    metrics.busy.said = {0: 0.25}
    return metrics


def test_names_and_labels_are_the_documented_ones() -> None:
    documented = {
        "moeserve_requests_total": {"method", "code"},
        "moeserve_request_duration_seconds_count": {"method"},
        "moeserve_tokens_total": {"layer"},
        "moeserve_expert_tokens_total": {"layer", "expert"},
        "moeserve_expert_dropped_tokens_total": {"layer", "expert", "reason"},
        "moeserve_stage_duration_seconds_count": {"stage"},
        "moeserve_batch_tokens_count": set(),
        "moeserve_queue_tokens": set(),
        "moeserve_queue_bytes": set(),
        "moeserve_placement_epoch": set(),
        "moeserve_expert_copies": {"layer", "expert", "state"},
        "moeserve_expert_balancedness_ratio": {"layer"},
        "moeserve_host_up": {"host"},
        "moeserve_host_state": {"host", "state"},
        "moeserve_host_queue_tokens": {"host"},
        "moeserve_hosts_failing": set(),
        "moeserve_hosts_missing": set(),
        "moeserve_wanted_hosts": set(),
        "moeserve_host_restarts_total": set(),
        "moeserve_expert_uses_total": {"host"},
        "moeserve_expert_loads_total": {"host"},
        "moeserve_expert_retries_total": {"reason"},
        "moeserve_partial_answers_total": {"policy"},
        "moeserve_host_balancedness_ratio": {"layer"},
        "moeserve_host_busy_ratio": {"host"},
        "moeserve_rebalances_total": {"outcome"},
        "moeserve_moved_experts_total": set(),
        "moeserve_moved_bytes_total": set(),
        "moeserve_messages_total": {"pattern"},
        "moeserve_aux_loss": {"layer"},
    }
    series = scraped(busy("full"))
    assert {name: {label for label, _ in next(iter(series[name]))} for name in documented} == documented
    beside = {name for name in series if not name.endswith(("_bucket", "_sum", "_created"))}
    assert beside == set(documented)


def test_stages_are_the_steps_of_a_batch() -> None:
    stages = {dict(labels)["stage"] for labels in scraped(busy("full"))["moeserve_stage_duration_seconds_count"]}
    assert stages == {"queue", "route", "dispatch", "experts", "combine"}


def test_every_token_and_pair_is_counted() -> None:
    series = scraped(busy("full"))
    assert series["moeserve_tokens_total"] == {(("layer", "layers.0"),): 12, (("layer", "layers.1"),): 0}
    for expert in range(NUM_EXPERTS):
        labels = (("expert", str(expert)), ("layer", "layers.0"))
        assert series["moeserve_expert_tokens_total"][labels] == expert + 1
        assert series["moeserve_expert_dropped_tokens_total"][(*labels, ("reason", "capacity"))] == 1
        assert series["moeserve_expert_copies"][(*labels, ("state", "live"))] == 1


@pytest.mark.parametrize(
    ("detail", "shown"),
    [("off", set()), ("top", set(range(NUM_EXPERTS - 32, NUM_EXPERTS))), ("full", set(range(NUM_EXPERTS)))],
)
def test_detail_bounds_the_series_of_a_layer_to_its_busiest_experts(detail: ExpertDetail, shown: set[int]) -> None:
    series = scraped(busy(detail))
    for name in ("moeserve_expert_tokens_total", "moeserve_expert_dropped_tokens_total", "moeserve_expert_copies"):
        of_layer = [dict(labels) for labels in series.get(name, {})]
        assert {int(labels["expert"]) for labels in of_layer if labels["layer"] == "layers.0"} == shown
        assert len(of_layer) == 2 * len(shown)
    assert len(series["moeserve_tokens_total"]) == 2


def test_with_a_limit_experts_that_cannot_be_had_are_told_first() -> None:
    """The busiest are the last ones; an alert waits for the first two."""
    metrics = busy("top")
    metrics.experts.live_copies[0][:2] = 0
    series = scraped(metrics)
    copies = {
        int(dict(labels)["expert"]): number for labels, number in series["moeserve_expert_copies"].items() if labels[1][1] == "layers.0"
    }
    assert len(copies) == 32
    assert [expert for expert, number in copies.items() if not number] == [0, 1]
    counted = {int(dict(labels)["expert"]) for labels in series["moeserve_expert_tokens_total"] if labels[1][1] == "layers.0"}
    assert counted == set(range(NUM_EXPERTS - 32, NUM_EXPERTS))


@pytest.mark.parametrize("detail", [None, "full", "top"])
@pytest.mark.parametrize("num_layers", [83, 84])
def test_above_so_many_series_only_the_busiest_are_told_unless_all_are_asked_for(
    detail: ExpertDetail | None, num_layers: int, caplog: pytest.LogCaptureFixture
) -> None:
    """40 experts have 3 series each: 83 layers are 9,960 series, 84 are 10,080."""
    metrics = Metrics([replace(SPECS[0], name=str(layer)) for layer in range(num_layers)], detail)
    is_limited = detail == "top" or (detail is None and num_layers == 84)
    for _ in range(2):
        assert len(scraped(metrics)["moeserve_expert_tokens_total"]) == num_layers * (32 if is_limited else NUM_EXPERTS)
    told = [record.getMessage() for record in caplog.records if record.name.startswith("moeserve.observe.")]
    assert len(told) == (detail is None and is_limited)
    assert all('observability.expert_detail: "full"' in line and "10080" in line for line in told)


def test_balancedness_is_mean_over_max_of_the_demand() -> None:
    ratio = scraped(busy("off"))["moeserve_expert_balancedness_ratio"]
    demand = [expert + 2 for expert in range(NUM_EXPERTS)]
    assert ratio[(("layer", "layers.0"),)] == pytest.approx(sum(demand) / NUM_EXPERTS / max(demand))
    assert ratio[(("layer", "layers.1"),)] == 1


def test_experts_without_weights_have_no_copies_that_could_be_missed() -> None:
    spec = LayerSpec("l", 8, 8, 6, "swiglu", False, "float32", GatingConfig(), identity_experts=1, zero_experts=1)
    series = scraped(Metrics([spec]))
    assert {int(dict(labels)["expert"]) for labels in series["moeserve_expert_copies"]} == {0, 1, 2, 3}
    assert {int(dict(labels)["expert"]) for labels in series["moeserve_expert_tokens_total"]} == set(range(6))


def test_calls_and_stages_are_timed() -> None:
    series = scraped(busy("off"))
    assert series["moeserve_requests_total"] == {(("code", "OK"), ("method", "Forward")): 1}
    assert series["moeserve_request_duration_seconds_sum"][(("method", "Forward"),)] == pytest.approx(0.02)
    assert series["moeserve_stage_duration_seconds_sum"][(("stage", "experts"),)] == pytest.approx(0.001)


def test_two_services_in_one_process_count_apart() -> None:
    one, other = Metrics(SPECS), Metrics(SPECS)
    one.host_restarts.inc()
    assert scraped(one)["moeserve_host_restarts_total"] == {(): 1}
    assert scraped(other)["moeserve_host_restarts_total"] == {(): 0}
