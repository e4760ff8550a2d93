"""`moeserve bench` against a whole service, and its load generator against a service whose speed is known."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moeserve import Client
from moeserve.api.output import ForwardOutput
from moeserve.bench.costs import read_costs
from moeserve.bench.fit import Measurement, RequestWork, fitted
from moeserve.bench.load import Load, Measured, WrongAnswer, check_answer, run
from moeserve.bench.trace import read_trace
from moeserve.cli.app import main
from moeserve.errors import Overloaded
from moeserve.observe.stats import CallCount, ServiceStats
from tests.support.engine import FakeEngine, identity, spec
from tests.support.harness import ServiceHarness
from tests.support.servers import served

LAYER = {"hidden_size": 16, "intermediate_size": 8, "num_experts": 4}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceHarness]:
    layers = [{**LAYER, "gating": {"top_k": 2, "capacity_factor": 1.0}}, {**LAYER, "gating": {"top_k": 1, "routing": "hash"}}]
    with ServiceHarness({"layers": layers, "placement": {"num_hosts": 2}}, "local", tmp_path_factory.mktemp("s")) as harness:
        yield harness


def bench(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = main(["bench", *argv])
    out, err = capsys.readouterr()
    return code, out, err


def failed(stats: ServiceStats) -> list[CallCount]:
    return [call for call in stats.calls if call.code != "OK"]


@pytest.mark.parametrize("stream", [(), ("--stream",)])
def test_a_sweep_as_json(capsys: pytest.CaptureFixture[str], service: ServiceHarness, stream: tuple[str, ...]) -> None:
    with Client(service.target) as client:
        before = client.stats()
        options = ("--tokens", "3,40", "--concurrency", "1,4", "--requests", "12", "--warmup-requests", "2", "--dtype", "bfloat16")
        code, out, err = bench(capsys, service.target, *options, "--json", *stream)
        after = client.stats()
    assert (code, err) == (0, "")
    said = json.loads(out)
    runs = said["runs"]
    assert (said["target"], said["dtype"], said["stream"]) == (service.target, "bfloat16", bool(stream))
    assert [(run["tokens_per_request"], run["concurrency"]) for run in runs] == [(3, 1), (3, 4), (40, 1), (40, 4)]
    assert failed(after) == failed(before)
    assert after.layers[0].tokens - before.layers[0].tokens == 2 * (12 + 2) * (3 + 40)
    for one in runs:
        assert (one["requests"], one["failed"], one["errors"]) == (12, 0, {})
        assert one["requested_pairs"] == 12 * one["tokens_per_request"] * 2
        assert one["tokens_per_s"] == pytest.approx(one["requests_per_s"] * one["tokens_per_request"])
        assert one["requests_per_s"] == pytest.approx(12 / one["elapsed_s"])
        latency = one["latency_ms"]
        assert 0 < latency["p50"] <= latency["p90"] <= latency["p99"] <= latency["max"] <= 1000 * one["elapsed_s"]
    assert runs[-1]["dropped_pairs"] > 0


def test_a_rate_sweep_as_a_table(capsys: pytest.CaptureFixture[str], service: ServiceHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = bench(capsys, service.target, "--layer", "layers.0", "--rate", "200,400", "--duration-s", "0.1")
    assert code == 0
    assert "rate/s" in out and "…" not in out
    rows = [line.split() for line in out.splitlines() if line.strip()[:2] == "64"]
    assert [row[:3] for row in rows] == [["64", "200", "20"], ["64", "400", "40"]]
    assert all(row[-1] == "0" for row in rows)


def test_a_layer_that_needs_token_ids(capsys: pytest.CaptureFixture[str], service: ServiceHarness) -> None:
    options = (service.target, "--layer", "1", "--requests", "3")
    code, out, _ = bench(capsys, *options)
    assert code == 1 and "failed: INVALID_ARGUMENT 3" in out
    assert bench(capsys, *options, "--token-ids")[0] == 0


def test_a_record_is_what_the_service_was_asked(capsys: pytest.CaptureFixture[str], service: ServiceHarness, tmp_path: Path) -> None:
    """Second by second: also by others, of every layer, before drops. `moeserve simulate` plays it."""
    file = tmp_path / "trace.jsonl"
    with Client(service.target) as other:
        before = other.stats().layers
        code, out, _ = bench(capsys, service.target, "--duration-s", "1.2", "--tokens", "40", "--record", str(file), "--json")
        after = other.stats().layers
    asked = [now.processed + now.dropped - then.processed - then.dropped for now, then in zip(after, before, strict=True)]
    assert code == 0 and json.loads(out)["runs"][0]["failed"] == 0
    trace = read_trace(file)
    assert trace.layers == {"layers.0": 4, "layers.1": 4}
    assert len(trace.lines) >= 2 and trace.lines[0].at_s < trace.lines[1].at_s
    assert [sum(line.rows[layer] for line in trace.lines).tolist() for layer in (0, 1)] == [each.tolist() for each in asked]
    assert asked[0].sum() > 0
    config = tmp_path / "service.toml"
    config.write_text("".join("[[layers]]\nhidden_size = 16\nintermediate_size = 8\nnum_experts = 4\n" for _ in range(2)))
    assert main(["simulate", str(config), "--hosts", "2", "--load", str(file), "--json"]) == 0


def test_costs_are_told_apart(capsys: pytest.CaptureFixture[str], service: ServiceHarness, tmp_path: Path) -> None:
    """A caller of one token pays for the call, the batch, the message and the pass; they are what it measures."""
    file = tmp_path / "costs.json"
    assert bench(capsys, service.target, "--costs", str(file)) == (0, "", "")
    costs = read_costs(file)
    assert (costs.hidden_size, costs.intermediate_size) == (16, 8)
    one_s = costs.pass_s + costs.expert_s.seconds(1)
    assert one_s > 0 and costs.call_s.seconds(1) > 0
    assert 0 < one_s + costs.call_s.seconds(1) + costs.batch_s.seconds(1) + costs.hop_s < 1
    assert 0 <= costs.call_s.slope + costs.batch_s.slope + costs.expert_s.slope < 0.01
    assert main(["simulate", "--layers", "1", "--experts", "8", "--top-k", "1", "--hosts", "2", "--costs", str(file)]) == 0


def test_known_costs_are_found_again() -> None:
    """From measurements that are made of them."""
    work = RequestWork.of([(0, range(8)), (3, range(8, 16))], [1] * 16, top_k=2)
    found = []
    for tokens in (1, 4, 16, 64, 256, 1024):
        messages, sent, experts, rows = work.expected(tokens)
        stages = {
            "queue": 0.0,
            "route": 2e-4 + 3e-6 * tokens,
            "dispatch": 1e-4 * messages + 2e-6 * sent,
            "experts": 5e-4 + 3e-4 * experts + 4e-5 * rows,
            "combine": 1e-6 * sent,
        }
        latency = sum(stages.values()) + 1e-3 + 5e-6 * tokens
        found.append(Measurement(tokens, [[latency] * 2] * 3, {name: [seconds] * 3 for name, seconds in stages.items()}))
    costs = fitted((8, 4), found, work)
    sizes = np.array([1.0, 10, 100, 2000])
    assert costs.call_s.at(sizes) == pytest.approx(1e-3 + 5e-6 * sizes, rel=1e-3)
    assert costs.batch_s.at(sizes) == pytest.approx(2e-4 + 3e-6 * sizes, rel=1e-3)
    assert [costs.hop_s, costs.sent_row_s, costs.summed_row_s] == pytest.approx([1e-4, 2e-6, 1e-6], rel=1e-3)
    assert costs.pass_s == pytest.approx(5e-4, rel=1e-3)
    rows = np.array([1.2, 5, 50, 500])
    assert costs.expert_s.at(rows) == pytest.approx(3e-4 + 4e-5 * rows, rel=1e-2)
    assert set(costs.spread) == {1.0}


def test_what_takes_longer_by_chance_is_the_spread() -> None:
    """One round of four took twice as long: whatever the request, a quarter of the values is above the mean."""
    measured = Measurement(8, [[0.1, 0.3], [0.1, 0.3], [0.2, 0.6], [0.1, 0.3]], {"route": [1e-3] * 4})
    spread = fitted((8, 4), [measured, measured], RequestWork.of([(0, range(4))], [1] * 4, top_k=1)).spread
    assert sum(spread) == pytest.approx(len(spread))
    assert max(spread) == pytest.approx(2 * min(spread), rel=0.05)
    assert sum(each > 1 for each in spread) == pytest.approx(len(spread) / 4, abs=2)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--concurrency", "1", "--rate", "1"), "exclude each other"),
        (("--duration-s", "1", "--requests", "1"), "exclude each other"),
        (("--tokens", "8,x"), "--tokens is '8,x'; expected a number"),
        (("--concurrency", "0"), "--concurrency is 0; allowed: more than 0"),
        (("--rate", "nan"), "--rate is nan; allowed: more than 0"),
        (("--duration-s", "0"), "--duration-s is 0.0; allowed: more than 0"),
        (("--requests", "-1"), "--requests is -1; allowed: 1 and more"),
        (("--dtype", "int8"), "--dtype is int8; allowed: float32"),
        (("--warmup-requests", "-1"), "--warmup-requests is -1"),
        (("--seed", str(2**64)), f"--seed is {2**64}; allowed: 0 to 2^63 - 1"),
        (("--timeout", "0"), "--timeout is 0"),
        (("--costs", "a", "--record", "b"), "--costs excludes --record and --stream"),
        (("--costs", "a", "--stream"), "--costs excludes --record and --stream"),
        (("--record", "/nowhere/trace"), "/nowhere/trace cannot be written: No such file or directory"),
        (("--costs", "/nowhere/costs"), "/nowhere/costs cannot be written: No such file or directory"),
    ],
)
def test_nonsense_is_refused_in_one_sentence(capsys: pytest.CaptureFixture[str], options: tuple[str, ...], sentence: str) -> None:
    code, out, err = bench(capsys, "127.0.0.1:1", *options)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and sentence in err


def test_no_service_and_no_layer(capsys: pytest.CaptureFixture[str], service: ServiceHarness) -> None:
    code, _, err = bench(capsys, "127.0.0.1:1")
    assert code == 3 and err.startswith("error: 127.0.0.1:1 is unavailable")
    code, _, err = bench(capsys, service.target, "--layer", "7")
    assert code == 1 and "there is no layer 7; served: 0..1 (layers.0, layers.1)" in err


def test_requests_that_no_message_can_bring(capsys: pytest.CaptureFixture[str]) -> None:
    with served(FakeEngine([(spec("l", hidden_size=2**20), identity)])) as (target, _, _):
        code, out, err = bench(capsys, target, "--tokens", "1000000")
    assert (code, out) == (1, "")
    assert err == f"error: 1000000 tokens of layer l have {2**22 * 10**6} bytes; a message has at most {2**30}\n"


def test_a_service_that_always_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    engine = FakeEngine([(spec("l"), identity)])
    engine.errors = [Overloaded("full")] * 100
    with served(engine) as (target, _, _):
        code, out, _ = bench(capsys, target, "--requests", "5", "--json")
    (one,) = json.loads(out)["runs"]
    assert code == 1
    assert one["errors"] == {"RESOURCE_EXHAUSTED": 5} and one["latency_ms"]["p50"] is None


@pytest.mark.parametrize("stream", [(), ("--stream",)])
def test_answers_are_checked(capsys: pytest.CaptureFixture[str], stream: tuple[str, ...]) -> None:
    """A service that answers NaN, and one that answers too few rows, are not taken for fast ones."""
    for wrong in (lambda x, ids, weights: x * float("nan"), lambda x, ids, weights: x[1:]):
        with served(FakeEngine([(spec("l"), wrong)])) as (target, _, _):
            code, out, _ = bench(capsys, target, "--requests", "4", "--json", *stream)
        assert code == 1 and json.loads(out)["runs"][0]["errors"] == {"WRONG_ANSWER": 4}


def test_a_broken_stream_fails_its_requests_and_ends(capsys: pytest.CaptureFixture[str]) -> None:
    engine = FakeEngine([(spec("l"), identity)])
    with served(engine, max_message_bytes=2**16) as (target, _, _):
        code, out, _ = bench(capsys, target, "--stream", "--tokens", "4096", "--requests", "3", "--concurrency", "2", "--json")
    assert code == 1 and sum(json.loads(out)["runs"][0]["errors"].values()) == 3


def answer(rows: int = 1) -> ForwardOutput:
    counts = torch.ones(1, dtype=torch.int64)
    return ForwardOutput(torch.ones(rows, 1), counts, counts, counts * 0, torch.zeros(rows, dtype=torch.bool), 0.0, 0.0)


class OneAtATime:
    """A service that takes `service_s` for each request, one after the other."""

    def __init__(self, service_s: float) -> None:
        self._lock, self._service_s = asyncio.Lock(), service_s
        self.most = self.running = 0

    async def send(self, number: int) -> ForwardOutput:
        self.running += 1
        self.most = max(self.most, self.running)
        async with self._lock:
            await asyncio.sleep(self._service_s)
        self.running -= 1
        return answer()


async def measure(load: Load, service: OneAtATime) -> dict[str, Any]:
    def check(out: ForwardOutput) -> None:
        check_answer(out, torch.ones(1, 1))

    measured: Measured = await run(load, service.send, check, lambda done: None)
    return measured.as_json()


async def test_latency_at_a_rate_counts_from_when_a_request_should_have_started() -> None:
    """20 requests at 1000/s to a service that does 100/s: the last waits for all before it. A closed loop would see 10 ms each."""
    service_s = 0.01
    result = await measure(Load(1, None, 1000.0, None, 20), OneAtATime(service_s))
    # Request i is due at i ms and answered no sooner than (i + 1) * 10 ms.
    floor_ms = [1000 * ((i + 1) * service_s - i / 1000) for i in range(20)]
    assert result["latency_ms"]["max"] >= floor_ms[-1] * 0.99
    assert result["latency_ms"]["p50"] >= floor_ms[9] * 0.99
    assert result["requests_per_s"] <= 1 / service_s * 1.01


async def test_a_stall_of_the_service_shows_in_every_request_that_was_due_meanwhile() -> None:
    """The first of 50 requests blocks the sender's own event loop for 100 ms: the 49 due meanwhile are late by what was left of it."""
    import time

    async def send(number: int) -> ForwardOutput:
        if number == 0:
            time.sleep(0.1)  # noqa: ASYNC251 - a stall is what is tested
        return answer()

    measured = await run(Load(1, None, 1000.0, None, 50), send, lambda out: None, lambda done: None)
    latencies_ms = sorted(1000 * latency for latency in measured.latencies_s)
    assert latencies_ms[-1] >= 99 and latencies_ms[0] >= 100 - 50
    assert measured.send_lag_s >= 0.09


async def test_a_closed_loop_keeps_so_many_under_way() -> None:
    service = OneAtATime(0.001)
    result = await measure(Load(1, 5, None, None, 30), service)
    assert (service.most, result["requests"], result["concurrency"]) == (5, 30, 5)


async def test_durations_end_loads() -> None:
    result = await measure(Load(1, None, 500.0, 0.05, None), OneAtATime(0.0))
    assert result["requests"] == 25
    result = await measure(Load(1, 1, None, 0.05, None), OneAtATime(0.001))
    assert 1 <= result["requests"] <= 51 and result["elapsed_s"] >= 0.05


@pytest.mark.parametrize(
    "wrong",
    [torch.ones(2, 1), torch.ones(1, 2), torch.ones(1, 1).half(), torch.full((1, 1), torch.inf), torch.full((1, 1), torch.nan)],
)
def test_wrong_answers(wrong: torch.Tensor) -> None:
    counts = torch.ones(1, dtype=torch.int64)
    with pytest.raises(WrongAnswer):
        check_answer(ForwardOutput(wrong, counts, counts, counts * 0, counts.bool(), 0.0, 0.0), torch.ones(1, 1))
    with pytest.raises(WrongAnswer, match="requested"):
        check_answer(ForwardOutput(torch.ones(1, 1), counts, counts, counts, counts.bool(), 0.0, 0.0), torch.ones(1, 1))
