"""Hosts with memory for half of their experts: the same answers bit by bit, and what happens while, and when not, experts are read."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from moeserve import Client, ConfigError, MoELayer
from moeserve.checkpoints.huggingface import HuggingFaceLayer
from moeserve.experts import ExpertShard
from moeserve.frontend import timing
from tests.support.checkpoints_on_disk import CONFIG, write_folder
from tests.support.closeness import assert_close
from tests.support.harness import ServiceHarness
from tests.support.seeded_folders import LAYER, replaced
from tests.support.waiting import until, until_async

HIDDEN, INNER, EXPERTS = 16, 32, 8
ONE = 3 * HIDDEN * INNER * 4


def folder(path: Path, seed: int) -> Path:
    path.mkdir()
    generator = torch.Generator().manual_seed(seed)
    shapes = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
    tensors = {
        f"{LAYER}.experts.{expert}.{name}.weight": torch.randn(shape, generator=generator) / 4
        for expert in range(EXPERTS)
        for name, shape in shapes.items()
    }
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_local_experts": EXPERTS}
    # Every expert is the first choice of a token of its own.
    return write_folder(path, {**CONFIG, **sizes}, {**tensors, f"{LAYER}.gate.weight": torch.eye(EXPERTS, HIDDEN)})


def token(expert: int, other: int | None = None) -> torch.Tensor:
    """[1, H]: routed to `expert` and to `other`, by default the next one."""
    row = torch.full((1, HIDDEN), 0.1)
    row[0, expert], row[0, (expert + 1) % EXPERTS if other is None else other] = 4, 3
    return row


def configuration(path: Path, room: int | None, **tables: Any) -> dict[str, Any]:
    """`room`: for so many experts in the memory of each of two hosts; None = for all."""
    limited = {"placement": {"num_hosts": 2}} if room is None else _limited(room)
    return {"model": {"checkpoint": path, "dtype": "float32"}, "layers": [{"gating": {"top_k": 2}}], **limited, **tables}


def _limited(room: int) -> dict[str, Any]:
    return {"placement": {"num_hosts": 2, "memory_per_host_bytes": room * ONE}, "store": {"spill": "disk"}}


@pytest.fixture
def served(tmp_path: Path) -> Path:
    return folder(tmp_path / "served", 0)


def requests() -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    yield from (token(expert) for expert in (0, 1, 0, 4, 7, 2))
    yield from (torch.randn(tokens, HIDDEN, generator=generator) for tokens in (1, 2, 17, 64, 1))


def answers(config: dict[str, Any], tmp_path: Path, asked: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    with ServiceHarness(config, "shm", tmp_path) as service, Client(service.target) as client:
        return [client.forward(rows).hidden_states for rows in asked]


def loads(service: ServiceHarness) -> dict[str, tuple[float, float]]:
    """By host: experts that passes have used, and that were read first."""
    families = text_string_to_metric_families(generate_latest(service.metrics.registry).decode())
    found = {(sample.name, sample.labels.get("host")): sample.value for family in families for sample in family.samples}
    names = ("moeserve_expert_uses_total", "moeserve_expert_loads_total")
    return {host: (found[names[0], host], found[names[1], host]) for name, host in found if name == names[0] and host is not None}


@pytest.mark.parametrize("kind", ["shm", "tcp"])
def test_a_model_of_twice_the_memory_is_served_bit_by_bit(kind: Any, served: Path, tmp_path: Path) -> None:
    asked = list(requests())
    exact = answers(configuration(served, None), tmp_path, asked)
    with ServiceHarness(configuration(served, 2), kind, tmp_path) as service, Client(service.target) as client:
        stores = [host.host.holdings.store for host in service.hosts]
        assert [store.nbytes for store in stores] == [2 * ONE] * 2, "as much is read at the start as there is room for"
        for rows, answer in zip(asked, exact, strict=True):
            assert torch.equal(client.forward(rows).hidden_states, answer)
            assert all(store.nbytes <= 2 * ONE for store in stores)
        with ThreadPoolExecutor(8) as pool:
            side_by_side = list(pool.map(lambda rows: client.forward(rows).hidden_states, asked * 4))
        # Who joins whom in a batch decides how a host's rows are summed up by the frontend: in float32, so not by bits.
        assert all(torch.allclose(ours, answer, atol=1e-5) for ours, answer in zip(side_by_side, exact * 4, strict=True))
        assert all(store.nbytes <= 2 * ONE for store in stores)
        counted = {store.cache.loads for store in stores if store.cache is not None}
        service.call(until_async(lambda: set(loads(service).values()) == counted))
        assert all(0 < read < used for used, read in counted)
        assert service.frontend.stats().expert_retries == 0


def test_what_is_in_memory_does_not_wait_for_what_is_read_and_a_slow_read_is_no_hang(
    served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host that owes an answer and gives none for a few times `hang_after_ms` is hung up on, unless experts come in."""
    read, armed, reading, go_on, is_slow = HuggingFaceLayer.experts, *(threading.Event() for _ in range(4))

    def experts(self: HuggingFaceLayer, shards: Sequence[ExpertShard]) -> Any:
        if armed.is_set():
            reading.set()
            assert go_on.wait(30)
        if is_slow.is_set():
            time.sleep(0.7)  # four of them take longer than what owes an answer may
        return read(self, shards)

    monkeypatch.setattr(HuggingFaceLayer, "experts", experts)
    monkeypatch.setattr(timing, "STUCK_HANGS", 1.5)
    config = configuration(served, 4, resilience={"hang_after_ms": 1000})
    config["placement"]["num_hosts"] = 1
    with ServiceHarness(config, "shm", tmp_path) as service, Client(service.target, retry=False) as client, ThreadPoolExecutor() as pool:
        for _ in range(20):
            client.forward(token(0))  # from now on it is known how long an answer takes
        armed.set()
        waiting = pool.submit(client.forward, token(5))
        assert reading.wait(30)
        client.forward(token(0))
        assert not waiting.done()
        go_on.set()
        waiting.result(30)
        is_slow.set()
        client.forward(torch.cat([token(2), token(7, 4)]))
        stats = service.frontend.stats()
        assert stats.hosts[0].restarts == 0 and stats.expert_retries == 0


@pytest.mark.parametrize("pattern", ["ring", "hierarchical"])
def test_a_host_that_passes_rows_on_and_reads_experts_answers_when_both_are_done(
    pattern: str, served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, armed, reading, go_on = HuggingFaceLayer.experts, *(threading.Event() for _ in range(3))

    def experts(self: HuggingFaceLayer, shards: Sequence[ExpertShard]) -> Any:
        if armed.is_set():
            reading.set()
            assert go_on.wait(30)
        return read(self, shards)

    monkeypatch.setattr(HuggingFaceLayer, "experts", experts)
    (expected,) = answers(configuration(served, None), tmp_path, [token(2, 5)])
    config = configuration(served, 2, communication={"pattern": pattern})
    with ServiceHarness(config, "shm", tmp_path) as service, Client(service.target) as client, ThreadPoolExecutor() as pool:
        armed.set()
        answer = pool.submit(client.forward, token(2, 5))
        assert reading.wait(30)
        until(lambda: (passed_on := list(service.hosts[0].host._loop._relayed.values())) and all(each.is_done for each in passed_on))
        go_on.set()
        assert torch.equal(answer.result(30).hidden_states, expected)
        assert service.frontend.stats().expert_retries == 0


def test_a_disk_that_takes_longer_than_a_host_may_be_silent_is_no_hang(
    served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is in memory, but has no room beside what is read, waits without holding the host up."""
    read, reading, slow_reads = HuggingFaceLayer.experts, threading.Event(), [None]

    def experts(self: HuggingFaceLayer, shards: Sequence[ExpertShard]) -> Any:
        if reading.is_set() and slow_reads:
            slow_reads.pop()
            time.sleep(3)
        return read(self, shards)

    monkeypatch.setattr(HuggingFaceLayer, "experts", experts)
    monkeypatch.setattr(timing, "STUCK_HANGS", 2.0)
    monkeypatch.setattr(timing, "STUCK_LOOK_S", 0.05)
    config = configuration(served, 2, resilience={"hang_after_ms": 1000})
    config["placement"]["num_hosts"] = 1
    with ServiceHarness(config, "shm", tmp_path) as service, Client(service.target, retry=False) as client, ThreadPoolExecutor() as pool:
        for _ in range(20):
            held = client.forward(token(0)).hidden_states
        reading.set()
        waiting = pool.submit(client.forward, token(2))
        until(lambda: not slow_reads)
        assert torch.equal(client.forward(token(0)).hidden_states, held)
        waiting.result(30)
        stats = service.frontend.stats()
        assert stats.hosts[0].restarts == 0 and stats.expert_retries == 0


def test_what_cannot_be_read_is_an_error_and_never_a_wrong_answer(served: Path, tmp_path: Path) -> None:
    """Until the files are back; what is in memory is answered all the time."""
    kept, other = Path(shutil.copytree(served, tmp_path / "kept")), folder(tmp_path / "other", 1)
    held, missing = answers(configuration(served, None), tmp_path, [token(0), token(2)])
    with ServiceHarness(configuration(served, 2), "shm", tmp_path) as service, Client(service.target) as client:
        assert torch.equal(client.forward(token(0)).hidden_states, held)
        replaced(served, other)
        with pytest.raises(ConfigError, match=rf"layer {LAYER} is not in {served} any more as it is served: the numbers in .* are others"):
            client.forward(token(2))
        assert torch.equal(client.forward(token(0)).hidden_states, held)
        (served / "model.safetensors").unlink()
        with pytest.raises(ConfigError, match=r"model\.safetensors cannot be read"):
            client.forward(token(2))
        replaced(served, kept)
        assert torch.equal(client.forward(token(2)).hidden_states, missing)


def test_a_copy_that_has_it_in_memory_answers(served: Path, tmp_path: Path) -> None:
    config = configuration(served, 4)
    config["placement"]["copies"] = 2
    with ServiceHarness(config, "shm", tmp_path) as service, Client(service.target, retry=False) as client:
        before = client.forward(token(4)).hidden_states
        (served / "model.safetensors").unlink()
        for _ in range(2):
            assert_close(client.forward(token(4)).hidden_states, before)


def test_a_swap_brings_new_weights_and_the_memory_stays_the_same(served: Path, tmp_path: Path) -> None:
    new, asked = folder(tmp_path / "new", 1), list(requests())
    exact = answers(configuration(new, None), tmp_path, asked)
    with ServiceHarness(configuration(served, 2), "shm", tmp_path) as service, Client(service.target) as client:
        for rows in asked:
            client.forward(rows)
        service.call(service.controller.swap(LAYER, new))
        for rows, answer in zip(asked, exact, strict=True):
            assert torch.equal(client.forward(rows).hidden_states, answer)
            assert all(host.host.holdings.store.nbytes <= 2 * ONE for host in service.hosts)
        keys = {key.origin for host in service.hosts for key in host.host.holdings.store.experts}
        assert len(keys) == 1, "the old ones are forgotten"


def test_layers_of_a_seed_are_made_again(tmp_path: Path) -> None:
    layer = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_experts": EXPERTS, "gating": {"top_k": 2}}
    shared = {**layer, "shared_expert": {"intermediate_size": INNER}}
    asked, config = list(requests()), {"layers": [layer, {**shared, "seed": 1}]}
    reference = [MoELayer(**layer, seed=0), MoELayer(**shared, seed=1)]  # type: ignore[arg-type]
    with ServiceHarness({**config, **_limited(3)}, "local", tmp_path) as service, Client(service.target) as client:
        for rows in asked:
            for number, one in enumerate(reference):
                assert_close(client.forward(rows, layer=number).hidden_states, one(rows))
        assert all(host.host.holdings.store.nbytes <= 3 * ONE for host in service.hosts)
