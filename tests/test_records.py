"""Records are read back from their messages as they were, whatever stands in them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeserve.observe.audit import AuditEvent
from moeserve.observe.records import plain, read, to_message
from moeserve.observe.stats import CallCount, Durations, Event, HostShards, HostStats, LayerInfo, LayerStats, ServiceStats
from moeserve.observe.status import FrontendStatus, HostStatus, LayerStatus, ServiceStatus
from moeserve.v1 import admin_service_pb2, moe_service_pb2

SMALL, LARGE, NUMBER = st.integers(0, 2**32 - 1), st.integers(0, 2**63), st.floats(allow_nan=False)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=9)


def records(kind: type, **lists: Any) -> Any:
    """Any record of a kind; `lists` says what its sequences hold."""
    given = {name: st.lists(one, max_size=3) for name, one in lists.items()}
    return st.builds(kind, **given)


def filled(kind: type, **lists: Any) -> Any:
    """As `records`, with values in the fields that have defaults too."""
    from dataclasses import fields

    of = {"int": SMALL, "str": TEXT, "bool": st.booleans(), "float": NUMBER, "float | None": st.none() | NUMBER}
    return records(kind, **lists).flatmap(
        lambda record: st.fixed_dictionaries({one.name: of[one.type] for one in fields(kind) if one.type in of}).map(
            lambda values: kind(**{**vars(record), **values})
        )
    )


SHARDS = filled(HostShards, experts=SMALL, shards=SMALL)
STATS = filled(
    ServiceStats,
    layers=filled(LayerStats, processed_by_expert=LARGE, dropped_by_expert=LARGE, live_copies=SMALL, placement=SHARDS),
    hosts=filled(HostStats),
    requests=filled(Durations, upper_bounds_s=NUMBER, counts=LARGE),
    stages=filled(Durations, upper_bounds_s=NUMBER, counts=LARGE),
    calls=filled(CallCount),
    events=filled(Event),
)
LAYERS = filled(LayerStatus, placement=SHARDS, copies=SMALL, demand_rows_per_s=NUMBER)
STATUS = filled(ServiceStatus, hosts=filled(HostStatus), frontends=filled(FrontendStatus), layers=LAYERS)


@settings(max_examples=30, deadline=None)
@given(STATS)
def test_statistics(stats: ServiceStats) -> None:
    assert read(ServiceStats, to_message(moe_service_pb2.GetStatsResponse, stats)) == stats


@settings(max_examples=30, deadline=None)
@given(STATUS)
def test_status(status: ServiceStatus) -> None:
    assert read(ServiceStatus, to_message(admin_service_pb2.GetPlacementResponse, status)) == status
    assert plain(status)["layers"] == [plain(layer) for layer in status.layers]


@settings(max_examples=30, deadline=None)
@given(filled(AuditEvent))
def test_events_of_the_audit_log(event: AuditEvent) -> None:
    assert read(AuditEvent, to_message(admin_service_pb2.AuditEvent, event)) == event


@pytest.mark.parametrize("ratio", [None, 0.0, 0.5])
def test_a_balancedness_that_is_not_known(ratio: float | None) -> None:
    stats, status = LayerStats("l", 0, [], [], host_balancedness=ratio), LayerStatus("l", 1, 1, [], host_balancedness=ratio)
    assert read(LayerStats, to_message(moe_service_pb2.LayerStats, stats)).host_balancedness == ratio
    assert read(LayerStatus, to_message(admin_service_pb2.PlacedLayer, status)).host_balancedness == ratio


@pytest.mark.parametrize("factor", [None, 0.0, 1.5])
def test_what_may_be_absent_and_what_is_an_enum(factor: float | None) -> None:
    layer = LayerInfo(1, "l", 2, 3, 4, 5, "swiglu", "bfloat16", factor)
    message = to_message(moe_service_pb2.LayerInfo, layer)
    assert read(LayerInfo, message) == layer
    message.dtype = 4711
    assert read(LayerInfo, message).dtype == "4711"
