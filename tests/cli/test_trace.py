"""`moeserve trace` against a whole service: the stages of its calls."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from moeserve.api.call_trace import CallTrace, HostTimes
from moeserve.api.wire import WireRequest
from moeserve.bench import floors
from moeserve.cli.app import main
from moeserve.client import LayerInfo
from moeserve.client.answers import encode_request
from tests.support.harness import ServiceHarness

LAYER = {"hidden_size": 16, "intermediate_size": 8, "num_experts": 4, "gating": {"top_k": 2}}
FORWARD = "/moeserve.v1.MoEService/Forward"
INSIDE = ["decode", "queue", "route", "plan", "write", "doorbell", "wake_up", "kernel", "reply", "combine", "encode"]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceHarness]:
    config = {"layers": [LAYER, {**LAYER, "name": "second"}], "placement": {"num_hosts": 2}}
    with ServiceHarness(config, "shm", tmp_path_factory.mktemp("s")) as harness:
        yield harness


def trace(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = main(["trace", *argv])
    out, err = capsys.readouterr()
    return code, out, err


def called(service: ServiceHarness, metadata: Any = ()) -> dict[str, Any]:
    """The trailing metadata of one call of two tokens."""
    with grpc.insecure_channel(service.target) as channel:
        message = encode_request(WireRequest(torch.ones(2, 16)))
        _, call = channel.unary_unary(FORWARD).with_call(message, metadata=metadata, timeout=30)
        return dict(call.trailing_metadata())


def test_stages_of_every_size_add_up_to_the_whole(capsys: pytest.CaptureFixture[str], service: ServiceHarness) -> None:
    code, out, err = trace(capsys, service.target, "--layer", "second", "--tokens", "1,40", "--calls", "6", "--json")
    assert (code, err) == (0, "")
    said = json.loads(out)
    assert (said["target"], said["layer"], said["dtype"]) == (service.target, "second", "float32")
    assert [(run["tokens"], run["calls"]) for run in said["runs"]] == [(1, 6), (40, 6)]
    for run in said["runs"]:
        names = [row["stage"] for row in run["stages"]]
        assert names == ["client_encode", "grpc_in", *INSIDE, "grpc_out", "client_decode", "other"]
        assert sum(row["mean_us"] for row in run["stages"]) == pytest.approx(run["whole"]["mean_us"], abs=2)
        assert sum(row["floor_us"] for row in run["stages"]) == pytest.approx(run["whole"]["floor_us"], abs=2)
        for row in run["stages"]:
            assert row["median_us"] <= row["p99_us"] and row["floor_us"] >= 0
            assert row["median_us"] >= 0, row
        needed = {row["stage"]: row["floor_us"] for row in run["stages"]}
        assert all(needed[name] > 0 for name in ("grpc_in", "grpc_out", "route", "doorbell", "kernel", "reply"))


def test_the_floor_of_the_kernel_is_that_of_the_faster_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU that multiplies no 16-bit numbers, a product of them takes far longer than the service."""
    layer = LayerInfo(
        0, "", hidden_size=16, intermediate_size=8, num_experts=4, top_k=2, activation="swiglu", dtype="bfloat16", capacity_factor=None
    )
    before = torch.get_num_threads()
    took: list[torch.dtype] = []

    def seconds(function: Callable[[], torch.Tensor]) -> float:
        took.append(function().dtype)
        return 9.0 if took[-1] is torch.bfloat16 else 0.5

    monkeypatch.setattr(floors, "_least_s", seconds)
    assert floors._kernel_s(layer, floors.HostPart(2, 3), 1) == 0.5
    assert torch.bfloat16 in took and torch.get_num_threads() == before


def test_a_table_for_people(capsys: pytest.CaptureFixture[str], service: ServiceHarness) -> None:
    code, out, err = trace(capsys, service.target, "--tokens", "3", "--calls", "2")
    assert (code, err) == (0, "")
    for text in ("3 tokens", "floor", "gRPC in", "decode + validate", "host wake-up", "whole"):
        assert text in out


def test_only_callers_who_ask_are_told(service: ServiceHarness) -> None:
    assert "moeserve-timing" not in called(service)
    told = called(service, (("moeserve-timing", "1"),))["moeserve-timing"]
    assert len(told) < 1024
    said = json.loads(told)
    assert set(said["stages_us"]) <= {*INSIDE, "other"} and said["epoch"] == 1
    assert 1 <= said["hosts"] <= 2 and said["batch_tokens"] == 2 and 2 <= said["rows"] <= 4


def test_calls_that_run_together_are_told_of_their_batch(service: ServiceHarness) -> None:
    metadata = (("moeserve-timing", "1"),)
    with ThreadPoolExecutor(8) as pool:
        told = [json.loads(each["moeserve-timing"]) for each in pool.map(lambda _: called(service, metadata), range(16))]
    for said in told:
        assert said["batch_tokens"] >= 2 and sum(said["stages_us"].values()) > 0
        assert all(us >= 0 for us in said["stages_us"].values()), said


def test_a_large_call_that_runs_in_turns(tmp_path: Path) -> None:
    config = {"layers": [LAYER], "placement": {"num_hosts": 2}, "batching": {"max_batch_tokens": 512, "micro_batches": 2}}
    with ServiceHarness(config, "tcp", tmp_path) as service, grpc.insecure_channel(service.target) as channel:
        message = encode_request(WireRequest(torch.ones(3000, 16)))
        _, call = channel.unary_unary(FORWARD).with_call(message, metadata=(("moeserve-timing", "1"),), timeout=60)
        said = json.loads(dict(call.trailing_metadata())["moeserve-timing"])
    assert said["batch_tokens"] == 3000 and said["messages"] > 2
    assert all(us >= 0 for us in said["stages_us"].values()), said
    assert {"route", "plan", "write", "kernel", "combine"} <= set(said["stages_us"])


@contextmanager
def relayed(target: str, changed: Callable[[str], str | None]) -> Iterator[str]:
    """A server that passes every call on, and changes what is told of its stages; None = nothing is."""
    with grpc.insecure_channel(target) as channel, ThreadPoolExecutor(2) as pool:

        class Relay(grpc.GenericRpcHandler):
            def service(self, details: grpc.HandlerCallDetails) -> Any:
                def call(message: bytes, context: grpc.ServicerContext) -> bytes:
                    asked = [pair for pair in details.invocation_metadata if pair[0].startswith("moeserve")]
                    answer, ended = channel.unary_unary(details.method).with_call(message, metadata=asked, timeout=30)
                    told = {key: changed(value) for key, value in ended.trailing_metadata() if key == "moeserve-timing"}
                    context.set_trailing_metadata([(key, value) for key, value in told.items() if value is not None])
                    return answer

                return grpc.unary_unary_rpc_method_handler(call)

        server = grpc.server(pool)
        server.add_generic_rpc_handlers((Relay(),))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            server.stop(None).wait()


def test_a_service_with_another_clock(capsys: pytest.CaptureFixture[str], service: ServiceHarness) -> None:
    def elsewhere(told: str) -> str:
        said = json.loads(told)
        return json.dumps({**said, "received_ns": said["received_ns"] + 10**13})

    with relayed(service.target, elsewhere) as target:
        code, out, err = trace(capsys, target, "--tokens", "2", "--calls", "3", "--json")
    assert (code, err) == (0, "")
    (run,) = json.loads(out)["runs"]
    assert [row["stage"] for row in run["stages"]] == ["client_encode", "network", *INSIDE, "client_decode", "other"]
    assert sum(row["mean_us"] for row in run["stages"]) == pytest.approx(run["whole"]["mean_us"], abs=2)


@pytest.mark.parametrize(
    "told", [None, "", "[]", "{}", '{"stages_us":[]}', '{"stages_us":{"route":"x"},"received_ns":1,"rows":1,"messages":1}']
)
def test_a_service_that_says_nothing_or_nonsense(capsys: pytest.CaptureFixture[str], service: ServiceHarness, told: str | None) -> None:
    with relayed(service.target, lambda _: told) as target:
        code, out, err = trace(capsys, target, "--tokens", "1", "--calls", "1")
    assert (code, out) == (1, "")
    assert ("which cannot be read" if told is not None else "it is older than this command") in err


@pytest.mark.parametrize("offset_s", [-1e6, 1e6])
def test_a_host_with_another_clock(offset_s: float) -> None:
    call = CallTrace()
    call.began = 10.0
    call.marks = [("write", 11.0), ("doorbell", 12.0), ("hosts", 20.0), ("combine", 21.0)]
    call.hosts = [HostTimes(0, 1, 11.5, 13 + offset_s, 15 + offset_s, 19.0), HostTimes(1, 1, 11.6, 13 + offset_s, 16 + offset_s, 19.9)]
    spent = [(stage.name, stage.end - stage.start) for stage in call.stages()]
    assert spent == [("write", 1), ("doorbell", 1), ("host_network", 2.5), ("kernel", 3), ("host_network", 2.5), ("combine", 1)]


def test_a_host_that_began_while_others_were_told() -> None:
    call = CallTrace()
    call.began = 10.0
    call.marks = [("write", 11.0), ("doorbell", 14.0), ("hosts", 20.0)]
    call.hosts = [HostTimes(1, 1, 11.2, 12.0, 13.0, 15.0), HostTimes(0, 1, 11.5, 13.0, 18.0, 19.0)]
    spent = [(stage.name, stage.end - stage.start) for stage in call.stages()]
    assert spent == [("write", 1), ("doorbell", 2), ("wake_up", 0), ("kernel", 5), ("reply", 2)]


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (("--tokens", "none"), "--tokens is 'none'"),
        (("--calls", "0"), "--calls is 0; allowed: 1 to 100000"),
        (("--seed", str(2**64)), "--seed is 18446744073709551616; allowed: 0 to 2^63 - 1"),
        (("--dtype", "int8"), "--dtype is int8; allowed: float32"),
    ],
)
def test_what_cannot_be_measured_is_refused(capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], sentence: str) -> None:
    code, _, err = trace(capsys, "127.0.0.1:1", *argv)
    assert code == 2 and sentence in err


def test_no_service(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        code, _, err = trace(capsys, f"127.0.0.1:{taken.getsockname()[1]}", "--timeout", "1", "--calls", "1")
    assert code == 3 and "error" in err


def test_no_such_layer(capsys: pytest.CaptureFixture[str], service: ServiceHarness) -> None:
    code, _, err = trace(capsys, service.target, "--layer", "third")
    assert code == 1 and "there is no layer 'third'; served: " in err
