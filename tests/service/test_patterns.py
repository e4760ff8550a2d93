"""Every pattern and number of micro-batches gives the answer of the layer in one process, with the messages it promises."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moeserve import MoELayer
from moeserve.api.request import LayerRequest
from moeserve.frontend import routed
from moeserve.frontend.patterns import PATTERNS
from tests.support.closeness import assert_close
from tests.support.harness import CHANNELS, ServiceHarness, received
from tests.support.kinds_of_experts import EXPERTS, HIDDEN, KINDS

TOKENS = (0, 1, 7, 300)
NODES = {1: ["a"], 3: ["a", "b", "b"], 4: ["a", "b", "a", "b"]}


@pytest.fixture(scope="module", params=[(kind, hosts) for kind in CHANNELS for hosts in NODES], ids=lambda p: f"{p[0]}-{p[1]}-hosts")
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int, Path]]:
    kind, hosts = request.param
    yield kind, hosts, tmp_path_factory.mktemp("s")


def config(tiny_moe: Path, hosts: int, pattern: str = "all_to_all", micro_batches: int = 1) -> dict[str, object]:
    return {
        "model": {"checkpoint": tiny_moe, "dtype": "float32", "layers": [0]},
        "placement": {"num_hosts": hosts},
        "communication": {"pattern": pattern},
        "batching": {"micro_batches": micro_batches},
    }


def assert_same_as_in_one_process(service: ServiceHarness, local: MoELayer, num_tokens: int) -> torch.Tensor:
    """Returns the tokens of every expert."""
    hidden_states = torch.randn(num_tokens, local.spec.hidden_size, generator=torch.Generator().manual_seed(num_tokens))
    out = service.call(service.frontend.forward(0, LayerRequest(hidden_states)))
    expected = local.run(hidden_states)
    assert_close(out.hidden_states, expected.hidden_states)
    assert torch.equal(out.processed, expected.processed)
    return out.processed


@pytest.mark.parametrize("pattern", PATTERNS)
def test_answers_and_messages(cluster: tuple[str, int, Path], tiny_moe: Path, pattern: str) -> None:
    kind, hosts, folder = cluster
    local = MoELayer.from_checkpoint(tiny_moe, 0, dtype=torch.float32)
    with ServiceHarness(config(tiny_moe, hosts, pattern), kind, folder, NODES[hosts]) as service:
        for num_tokens in TOKENS:
            before = [received(host) for host in service.hosts]
            processed = assert_same_as_in_one_process(service, local, num_tokens)
            arrived = [received(host) - count for host, count in zip(service.hosts, before, strict=True)]
            assert arrived == expected_messages(service, pattern, processed), f"{num_tokens} tokens"
        sample = service.metrics.registry.get_sample_value
        assert sample("moeserve_messages_total", {"pattern": pattern}) > 0
        assert sample("moeserve_expert_retries_total", {"reason": "host_lost"}) == 0


def expected_messages(service: ServiceHarness, pattern: str, processed: torch.Tensor) -> list[int]:
    """How many each host gets, from the frontend and from other hosts, when `processed` [E] says which experts are busy."""
    placement = service.placement.layers[0]
    busy = processed[torch.from_numpy(placement.logical_of_physical)] > 0
    experts = [int(busy[torch.from_numpy(placement.host_of_physical == host.number)].sum()) for host in service.hosts]
    return experts if pattern == "point_to_point" else [min(1, count) for count in experts]


@pytest.mark.parametrize(("pattern", "from_frontend"), [("all_to_all", 4), ("point_to_point", 8), ("hierarchical", 2), ("ring", 1)])
def test_how_many_messages_leave_the_frontend(tiny_moe: Path, tmp_path: Path, pattern: str, from_frontend: int) -> None:
    """Each host gets one either way; with a relay most of them come from a host: one per node crosses the network, or one in all."""
    local = MoELayer.from_checkpoint(tiny_moe, 0, dtype=torch.float32)
    with ServiceHarness(config(tiny_moe, 4, pattern), "shm", tmp_path, NODES[4]) as service:
        processed = assert_same_as_in_one_process(service, local, 300)
        assert (processed > 0).all()
        assert service.metrics.registry.get_sample_value("moeserve_messages_total", {"pattern": pattern}) == from_frontend
        passed_on = [len(host.host.relay._peers) for host in service.hosts]
        assert passed_on == {"hierarchical": [1, 1, 0, 0], "ring": [1, 1, 1, 0]}.get(pattern, [0, 0, 0, 0])


@pytest.mark.parametrize("pattern", ["all_to_all", "hierarchical"])
@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_micro_batches(tiny_moe: Path, tmp_path: Path, micro_batches: int, pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routed, "MIN_MICRO_BATCH_TOKENS", 3)
    local = MoELayer.from_checkpoint(tiny_moe, 0, dtype=torch.float32)
    with ServiceHarness(config(tiny_moe, 3, pattern, micro_batches), "shm", tmp_path) as service:
        for num_tokens in TOKENS:
            assert_same_as_in_one_process(service, local, num_tokens)
        before = received(service.hosts[0])
        assert_same_as_in_one_process(service, local, 300)
        assert received(service.hosts[0]) - before == micro_batches


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("kind", ["gated", "residual", "identity and zero"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_copies_shards_and_shared_experts(
    pattern: str, kind: str, micro_batches: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a host is asked to do is more than one pair per choice; some is left to the frontend itself, once for a whole batch."""
    monkeypatch.setattr(routed, "MIN_MICRO_BATCH_TOKENS", 3)
    layer: dict[str, Any] = {"hidden_size": HIDDEN, "num_experts": EXPERTS, "gating": {"top_k": 2, "capacity_factor": 0.7}, **KINDS[kind]}
    placed = {"num_hosts": 4, "copies": 2, "tensor_parallel": 2}
    more = {"communication": {"pattern": pattern}, "batching": {"micro_batches": micro_batches}}
    with ServiceHarness({"layers": [layer], "placement": placed, **more}, "shm", tmp_path, NODES[4]) as service:
        for num_tokens in TOKENS:
            assert_same_as_in_one_process(service, MoELayer(**layer), num_tokens)


@pytest.mark.parametrize(
    ("num_tokens", "wanted", "sizes"),
    [
        (0, 4, [0]),
        (1, 4, [1]),
        (1023, 2, [1023]),
        (1024, 2, [512, 512]),
        (1537, 4, [512, 512, 513]),
        (4096, 2, [2048, 2048]),
        (4096, 1, [4096]),
    ],
)
def test_how_a_batch_is_cut(num_tokens: int, wanted: int, sizes: list[int]) -> None:
    ranges = routed.micro_batches(0, num_tokens, wanted)
    assert [end - start for start, end in ranges] == sizes
    assert [start for start, _ in ranges] == [0, *(end for _, end in ranges)][: len(ranges)]
