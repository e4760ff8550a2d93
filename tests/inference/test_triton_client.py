"""The client of Triton, as it is, against a whole service; its answers are those of our own client.

T tokens, H hidden size, E experts, K choices per token.
"""

from __future__ import annotations

import asyncio
import queue
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tritonclient.utils import InferenceServerException

from moeserve import Client
from tests.support.closeness import assert_close
from tests.support.harness import ServiceHarness
from tests.support.two_layers import tokens

DEFAULTS = ["hidden_states", "requested", "processed", "dropped"]
ON_REQUEST = ["dropped_tokens", "aux_loss", "z_loss", "model_revision", "topk_ids", "topk_weights", "slots", "drop_reasons"]
DTYPES = {"FP32": (torch.float32, np.float32), "FP16": (torch.float16, np.float16), "BF16": (torch.bfloat16, ml_dtypes.bfloat16)}

REPOSITORY = Path(__file__).parents[2]
ROWS = tokens(0)


def array(value: torch.Tensor) -> np.ndarray:
    return value.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if value.dtype is torch.bfloat16 else value.numpy()


def given(name: str, value: torch.Tensor, datatype: str) -> triton.InferInput:
    made = triton.InferInput(name, list(value.shape), datatype)
    made.set_data_from_numpy(array(value))
    return made


def rows(value: torch.Tensor = ROWS, datatype: str = "FP32") -> list[triton.InferInput]:
    return [given("hidden_states", value, datatype)]


def name_of(service: ServiceHarness, layer: int | str = "layers.0") -> str:
    return f"{service.frontend.model}/{layer}"


def expected(service: ServiceHarness, value: torch.Tensor = ROWS, **options: Any) -> Any:
    with Client(service.target) as own:
        return own.forward(value, layer=0, **options)


def same(result: Any, service: ServiceHarness, value: torch.Tensor = ROWS) -> bool:
    """As far as rounding lets requests be that run together with others, or alone."""
    assert_close(torch.from_numpy(result.as_numpy("hidden_states").copy()), expected(service, value).hidden_states)
    return True


def test_the_documented_client(service: ServiceHarness, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs" / "open-inference.md").read_text(), re.S)
    names: dict[str, Any] = {}
    exec(code.replace("127.0.0.1:50051", service.target), names)
    names["client"].close()
    assert capsys.readouterr().out.startswith("(16, 16) [")


def test_it_finds_out_what_is_served(service: ServiceHarness, client: triton.InferenceServerClient) -> None:
    assert client.is_server_live() and client.is_server_ready()
    assert client.get_server_metadata().name == "moeserve"
    listed = client.get_model_repository_index().models
    assert [(each.name, each.version, each.state) for each in listed] == [(name_of(service, f"layers.{n}"), "1", "READY") for n in (0, 1)]
    for model in listed:
        assert client.is_model_ready(model.name) and client.is_model_ready(model.name, "1")
        told = client.get_model_metadata(model.name)
        assert [(each.name, each.datatype, list(each.shape)) for each in told.inputs] == [("hidden_states", "FP32", [-1, 16])]
        assert [each.name for each in told.outputs] == DEFAULTS
        config = client.get_model_config(model.name).config
        assert (config.name, config.max_batch_size) == (model.name, 0)
        # Load generators (perf_analyzer) give up when one of them names a tensor that the other does not.
        assert [(each.name, list(each.dims)) for each in config.input] == [(each.name, list(each.shape)) for each in told.inputs]
        assert [(each.name, list(each.dims)) for each in config.output] == [(each.name, list(each.shape)) for each in told.outputs]


@pytest.mark.parametrize("datatype", DTYPES)
def test_one_call(service: ServiceHarness, client: triton.InferenceServerClient, datatype: str) -> None:
    value = tokens(1).to(DTYPES[datatype][0])
    for layer in ("layers.0", 0):
        result = client.infer(name_of(service, layer), rows(value, datatype), request_id="a-7")
        own, answer = expected(service, value), result.get_response()
        assert (answer.model_name, answer.model_version, answer.id) == (name_of(service, layer), "1", "a-7")
        assert [each.name for each in answer.outputs] == DEFAULTS
        assert answer.outputs[0].datatype == datatype
        found = result.as_numpy("hidden_states")
        assert_close(torch.from_numpy(found.astype(np.float32)), own.hidden_states.float(), rounded_to=value.dtype)
        for name in DEFAULTS[1:]:
            assert result.as_numpy(name).tolist() == getattr(own, name).tolist()


def test_all_that_a_request_can_have_and_an_answer_can_say(service: ServiceHarness, client: triton.InferenceServerClient) -> None:
    value, used = tokens(2), torch.arange(30) % 3 > 0
    inputs = [*rows(value), given("used_token", used, "BOOL")]
    result = client.infer(name_of(service), inputs, outputs=[triton.InferRequestedOutput(name) for name in ON_REQUEST + DEFAULTS])
    own = expected(service, value, used_token=used, return_routing=True)
    assert [each.name for each in result.get_response().outputs] == ON_REQUEST + DEFAULTS
    for name in ON_REQUEST + DEFAULTS:
        found = torch.from_numpy(result.as_numpy(name).copy())
        wanted = torch.as_tensor(getattr(own, name), dtype=found.dtype).reshape(found.shape)
        assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5), name
    routed = [*rows(value), given("topk_ids", own.topk_ids, "INT64"), given("topk_weights", own.topk_weights, "FP32")]
    again = client.infer(name_of(service), routed, outputs=[triton.InferRequestedOutput("hidden_states")])
    assert [each.name for each in again.get_response().outputs] == ["hidden_states"]
    assert_close(torch.from_numpy(again.as_numpy("hidden_states").copy()), own.hidden_states)


def test_an_empty_batch(service: ServiceHarness, client: triton.InferenceServerClient) -> None:
    result = client.infer(name_of(service), rows(torch.zeros(0, 16)))
    assert result.as_numpy("hidden_states").shape == (0, 16)
    assert result.as_numpy("requested").tolist() == [0] * 8


def test_calls_with_a_callback_and_of_asyncio(service: ServiceHarness, client: triton.InferenceServerClient) -> None:
    got: queue.Queue[tuple[Any, Any]] = queue.Queue()
    for _ in range(4):
        client.async_infer(name_of(service), rows(), callback=lambda result, error: got.put((result, error)))
    client.async_infer("no-such/model", rows(), callback=lambda result, error: got.put((result, error)))
    ended = [got.get(timeout=30) for _ in range(5)]
    assert sum(error is None and same(result, service) for result, error in ended) == 4
    assert [error.status() for _, error in ended if error] == ["StatusCode.NOT_FOUND"]

    async def ask() -> list[Any]:
        async with triton_aio.InferenceServerClient(service.target) as other:
            assert await other.is_server_ready()
            return list(await asyncio.gather(*(other.infer(name_of(service), rows()) for _ in range(4))))

    assert all(same(result, service) for result in asyncio.run(ask()))


def test_a_stream_answers_in_order_and_survives_what_fails(service: ServiceHarness, client: triton.InferenceServerClient) -> None:
    got: list[tuple[Any, Any]] = []
    client.start_stream(lambda result, error: got.append((result, error)))
    for number in range(12):
        # The first ones take longer.
        value = tokens(3).repeat(40 if number < 3 else 1, 1)
        model = "no-such/model" if number == 5 else name_of(service)
        client.async_stream_infer(model, rows(value), request_id=str(number), enable_empty_final_response=True)
    client.stop_stream()
    assert [None if error else result.get_response().id for result, error in got] == [str(n) if n != 5 else None for n in range(12)]
    assert "no-such/model" in str(got[5][1])
    assert all(same(result, service, tokens(3)) for result, _ in got[6:])
    assert all(result.get_response().parameters["triton_final_response"].bool_param for result, error in got if not error)


def test_statistics_grow_by_what_was_asked(service: ServiceHarness, client: triton.InferenceServerClient) -> None:
    model = name_of(service, "layers.1")

    def seen() -> Any:
        ((stats),) = client.get_inference_statistics(model).model_stats
        return stats

    stages = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output")
    before = seen()
    for _ in range(3):
        client.infer(model, rows())
    with pytest.raises(InferenceServerException):
        client.infer(model, rows(torch.zeros(2, 5)))
    after = seen()
    assert (after.name, after.version) == (model, "1")
    assert after.inference_count - before.inference_count == after.execution_count - before.execution_count == 3
    assert after.last_inference >= before.last_inference > 0 or before.last_inference == 0
    for stage in stages:
        was, now = getattr(before.inference_stats, stage), getattr(after.inference_stats, stage)
        assert now.count - was.count == (1 if stage == "fail" else 3), stage
        assert now.ns > was.ns, stage
    whole = after.inference_stats
    parts = sum(getattr(whole, stage).ns for stage in stages[2:])
    assert abs(whole.success.ns - parts) < 4 * whole.success.count  # rounded
    assert [each.name for each in client.get_inference_statistics().model_stats] == [name_of(service), model]
    number = f"{service.frontend.model}/1"
    (by_number,) = client.get_inference_statistics(number).model_stats
    assert (by_number.name, by_number.inference_count) == (number, after.inference_count)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "an unknown version": (lambda: {"model_version": "2"}, "NOT_FOUND"),
    "a sequence": (lambda: {"sequence_id": 5}, "INVALID_ARGUMENT"),
    "a priority": (lambda: {"priority": 1}, "INVALID_ARGUMENT"),
    "an unknown parameter": (lambda: {"parameters": {"temperature": 1.0}}, "INVALID_ARGUMENT"),
    "an unknown output": (lambda: {"outputs": [triton.InferRequestedOutput("logits")]}, "INVALID_ARGUMENT"),
    "a classification": (lambda: {"outputs": [triton.InferRequestedOutput("hidden_states", class_count=3)]}, "INVALID_ARGUMENT"),
    "a timeout in the past": (lambda: {"timeout": -1}, "INVALID_ARGUMENT"),
    "a timeout that is too short": (lambda: {"timeout": 1}, "DEADLINE_EXCEEDED"),
    "a text as a number": (lambda: {"parameters": {"capacity_factor": "2"}}, "INVALID_ARGUMENT"),
    "a gate that may not be changed": (lambda: {"parameters": {"capacity_factor": 2.0}}, "INVALID_ARGUMENT"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_meant_here_is_refused(service: ServiceHarness, client: triton.InferenceServerClient, what: str) -> None:
    options, code = REFUSED[what]
    with pytest.raises(InferenceServerException) as caught:
        client.infer(name_of(service), rows(), **options())
    assert caught.value.status() == f"StatusCode.{code}", caught.value
    assert caught.value.message()


def test_a_long_timeout_is_no_obstacle(service: ServiceHarness, client: triton.InferenceServerClient) -> None:
    assert same(client.infer(name_of(service), rows(), timeout=60_000_000, client_timeout=30), service)


@pytest.mark.parametrize("ask", ["is_model_ready", "get_model_metadata", "get_model_config", "get_inference_statistics"])
@pytest.mark.parametrize("model", ["layers.0", "tiny", "/layers.0", "other/layers.0", "", "{}/layers.7", "{}/2", "{}/-1", "{}/"])
def test_models_that_are_not_served(service: ServiceHarness, client: triton.InferenceServerClient, ask: str, model: str) -> None:
    if not model and ask == "get_inference_statistics":
        return  # all of them
    with pytest.raises(InferenceServerException) as caught:
        getattr(client, ask)(model.format(service.frontend.model))
    assert caught.value.status() == "StatusCode.NOT_FOUND"
