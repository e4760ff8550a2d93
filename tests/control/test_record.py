"""What is written down or told is read back as it was; what could not be served is not believed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeserve.checkpoints import FileMark, Fingerprint, Swap
from moeserve.config import PlacementConfig, load_config, load_json
from moeserve.control.follow import Order, Report, Setup, followed_config
from moeserve.control.record import host_message, packed_counts, read_hosts, read_release, release_message
from moeserve.errors import ConfigError, InvalidRequest
from moeserve.observe.call_times import NUM_TIMES
from moeserve.observe.stats import HostInfo
from moeserve.placement import plan_placement
from moeserve.release import Release
from moeserve.transport import KeyPair
from moeserve.v1 import control_service_pb2 as pb
from tests.support.planning import renumbered
from tests.support.two_layers import spec

KEYS = KeyPair.generate()
TEXT = st.text(max_size=20)
HOSTS = st.builds(
    HostInfo,
    endpoints=st.lists(TEXT, min_size=1, max_size=3).map(tuple),
    public_key=st.sampled_from(["", KEYS.public]),
    pid=st.integers(0, 2**31),
    node=TEXT,
    device=TEXT,
    cuda_visible_devices=TEXT,
    num_threads=st.integers(0, 512),
    experts_held=st.integers(0, 2**20),
    weights_bytes=st.integers(0, 2**50),
    since_epoch=st.integers(0, 2**40),
)
FILES = st.builds(FileMark, path=TEXT, size=st.integers(0, 2**60), description=st.binary(max_size=16), numbers=st.binary(max_size=16))
FINGERPRINTS = st.builds(Fingerprint, st.lists(FILES, min_size=1, max_size=3).map(tuple))
SWAPS = st.builds(
    Swap,
    revision=st.integers(2, 2**40),
    fingerprint=st.none() | FINGERPRINTS,
    layer=st.text(min_size=1, max_size=9),
    checkpoint=st.sampled_from([Path("/a"), Path("/b/ü c")]),
    experts=st.none() | st.frozensets(st.integers(0, 999), min_size=1),
)


@st.composite
def releases(draw: st.DrawFn) -> Release:
    shards, copies = draw(st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 2)]))
    num_hosts = draw(st.integers(shards * copies, 8 if shards * copies == 1 else 6))
    config = PlacementConfig(num_hosts=num_hosts, copies=copies, tensor_parallel=shards)
    numbers = sorted(draw(st.sets(st.integers(0, 40), min_size=num_hosts, max_size=num_hosts)))
    placement = renumbered(plan_placement([spec()] * draw(st.integers(1, 3)), config), numbers, draw(st.integers(1, 2**40)))
    return Release(placement, tuple(draw(st.lists(SWAPS, max_size=3))), draw(st.dictionaries(TEXT, FINGERPRINTS, max_size=2)))


def assert_equal(one: Release, other: Release) -> None:
    assert (one.epoch, one.placement.num_hosts) == (other.epoch, other.placement.num_hosts)
    assert (one.swaps, one.deployed) == (other.swaps, other.deployed)
    assert len(one.placement.layers) == len(other.placement.layers)
    for layer, same in zip(one.placement.layers, other.placement.layers, strict=True):
        assert (layer.num_hosts, layer.tensor_parallel) == (same.num_hosts, same.tensor_parallel)
        assert np.array_equal(layer.unit_of_physical, same.unit_of_physical)
        assert np.array_equal(layer.host_of_physical, same.host_of_physical)


@given(releases())
def test_a_release_is_read_back(release: Release) -> None:
    message = pb.Release.FromString(release_message(release).SerializeToString())
    assert_equal(read_release(message), release)


@given(st.dictionaries(st.integers(0, 99), HOSTS, max_size=4))
def test_hosts_are_read_back(hosts: dict[int, HostInfo]) -> None:
    messages = [host_message(number, info).SerializeToString() for number, info in hosts.items()]
    assert read_hosts([pb.Host.FromString(message) for message in messages]) == hosts


@given(releases(), st.none() | releases(), st.dictionaries(st.integers(0, 99), HOSTS, max_size=2), st.sampled_from([None, KEYS]))
def test_an_order_is_read_back(current: Release, candidate: Release | None, hosts: dict[int, HostInfo], keys: KeyPair | None) -> None:
    order = Order(current, candidate, hosts, Setup("id", "{}", keys, 2.5), {number: f"why {number}" for number in hosts})
    read = Order.from_message(pb.FrontendOrder.FromString(order.to_message().SerializeToString()))
    assert (read.hosts, read.setup, read.failing) == (order.hosts, order.setup, order.failing)
    assert read.current is not None
    assert_equal(read.current, current)
    assert (read.candidate is None) == (candidate is None)
    assert Order.from_message(Order().to_message()) == Order()


@given(
    st.builds(
        Report,
        public_key=st.sampled_from(["", KEYS.public]),
        refusal=TEXT,
        call_times=st.just(()) | st.lists(st.integers(0, 2**48 - 1), min_size=NUM_TIMES, max_size=NUM_TIMES).map(tuple),
        requested=st.lists(st.lists(st.integers(0, 2**62), min_size=1, max_size=3).map(np.array), max_size=3).map(packed_counts),
        **dict.fromkeys(("name", "target", "node"), TEXT.filter(str.isprintable)),
    )
)
def test_a_report_is_read_back(report: Report) -> None:
    report = replace(report, epoch=3, oldest_epoch=2, tried_epoch=4, is_leaving=True, is_ready=True)
    assert Report.from_message(pb.FrontendReport.FromString(report.to_message().SerializeToString())) == report


def test_a_long_refusal_is_cut_and_a_long_name_refused() -> None:
    assert len(Report.from_message(Report("a", refusal="x" * 5000).to_message()).refusal) == 1000
    with pytest.raises(InvalidRequest, match="name is invalid; allowed: at most 256"):
        Report.from_message(Report("x" * 257).to_message())


@pytest.mark.parametrize("counts", [[b""], [b"1234567"], [b"12345678", b"123456789"], [b"12345678"] * 5000])
def test_counts_that_cannot_be_are_refused(counts: list[bytes]) -> None:
    with pytest.raises(InvalidRequest, match="requested is invalid; allowed: "):
        Report.from_message(pb.FrontendReport(name="a", requested=counts))


@pytest.mark.parametrize("counts", [[1], [0] * (NUM_TIMES + 1), [2**63] * NUM_TIMES])
def test_times_that_cannot_be_are_refused(counts: list[int]) -> None:
    with pytest.raises(InvalidRequest, match="call_times is invalid; allowed: "):
        Report.from_message(pb.FrontendReport(name="a", call_times=counts))


@pytest.mark.parametrize("field", ["name", "target", "metrics_target", "node"])
def test_no_frontend_writes_lines_into_the_log_of_its_controller(field: str) -> None:
    with pytest.raises(InvalidRequest, match=f"{field} is invalid; allowed: printable characters"):
        Report.from_message(Report(**{"name": "a", field: "a\n2026-01-01 ERROR moeserve: all is lost"}).to_message())


def packed(*numbers: int) -> bytes:
    return np.array(numbers, "<i4").tobytes()


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"unit_of_physical": b""}, "unit_of_physical"),
        ({"unit_of_physical": b"12345"}, "unit_of_physical"),
        ({"unit_of_physical": packed(0, 1, 2)}, "host_of_physical"),
        ({"unit_of_physical": packed(0, 1, 2, 4)}, "unit_of_physical"),
        ({"unit_of_physical": packed(0, 1, 1, 3)}, "unit_of_physical"),
        ({"unit_of_physical": packed(0, -1, 1, 2)}, "unit_of_physical"),
        ({"unit_of_physical": packed(0, 1, 2, 2**31 - 1)}, "unit_of_physical"),
        ({"host_of_physical": packed(0, 1, 0, 1)}, "host_of_physical"),
        ({"host_of_physical": packed(0, 0, 1, 2)}, "host_of_physical"),
        ({"host_of_physical": packed(-1, 0, 1, 1)}, "host_of_physical"),
        ({"tensor_parallel": 0}, "tensor_parallel"),
        ({"tensor_parallel": 3}, "tensor_parallel"),
    ],
)
def test_a_placement_that_cannot_be_is_refused(changes: dict[str, Any], field: str) -> None:
    told = {"unit_of_physical": packed(0, 1, 2, 3), "host_of_physical": packed(0, 0, 1, 1), "tensor_parallel": 2}
    assert read_release(pb.Release(epoch=1, num_hosts=2, layers=[pb.LayerPlacement(**told)])).placement.hosts == (0, 1)
    with pytest.raises(InvalidRequest, match=f"{field} is invalid; allowed: "):
        read_release(pb.Release(epoch=1, num_hosts=2, layers=[pb.LayerPlacement(**(told | changes))]))


@pytest.mark.parametrize("changes", [{"epoch": 0}, {"num_hosts": 0}, {"num_hosts": 2**31}, {"swaps": [pb.Swap(layer="a", checkpoint="b")]}])
def test_a_release_that_cannot_be_is_refused(changes: dict[str, Any]) -> None:
    layer = pb.LayerPlacement(unit_of_physical=packed(0), host_of_physical=packed(0), tensor_parallel=1)
    with pytest.raises(InvalidRequest):
        read_release(pb.Release(**({"epoch": 1, "num_hosts": 1, "layers": [layer]} | changes)))


@pytest.mark.parametrize("changes", [{"endpoints": []}, {"public_key": "short"}, {"number": 2**20}])
def test_a_host_that_cannot_be_reached_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        read_hosts([pb.Host(**({"endpoints": ["tcp://127.0.0.1:1"], "public_key": KEYS.public} | changes))])


def test_reasons_are_short_and_of_hosts_that_there_can_be() -> None:
    assert len(Order.from_message(Order(failing={1: "x" * 5000}).to_message()).failing[1]) == 1000
    with pytest.raises(InvalidRequest, match="failing is invalid; allowed: numbers below"):
        Order.from_message(pb.FrontendOrder(failing={2**20: "why"}))


def test_followed_configuration_keeps_what_was_said_and_what_was_not(tiny_moe: Path) -> None:
    told = {
        "model": {"checkpoint": tiny_moe, "dtype": "float32", "layers": [0, "model.layers.1.mlp"]},
        "layers": [{"name": "model.layers.1.mlp", "gating": {"top_k": 1}}],
        "placement": {"num_hosts": 3, "copies": {"default": 1, "model.layers.1.mlp": {"3": 2}}},
        "server": {"port": 1, "auth_token_file": "/secret"},
        "ray": {"address": "10.0.0.1:1"},
    }
    config = load_config(told)
    text = followed_config(config)
    assert "secret" not in text and "10.0.0.1" not in text
    followed = load_json(text)
    for table in ("model", "layers", "batching", "communication", "resilience", "observability"):
        assert getattr(followed, table) == getattr(config, table)
    assert followed.placement.copies == config.placement.copies
    assert followed.layers[0].model_fields_set == {"name", "gating"}
    assert followed.layers[0].gating.model_fields_set == {"top_k"}
    with pytest.raises(ConfigError, match="the controller's configuration cannot be used: no_such_table"):
        load_json('{"no_such_table": {}}')
