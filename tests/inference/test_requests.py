"""Requests that clients of Triton do not send: numbers instead of bytes, and what is refused.

T tokens, H hidden size, E experts, K choices per token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moeserve.api.protobuf import length_delimited
from moeserve.errors import MoEServeError
from moeserve.server.inference.decoding import decode, parse
from moeserve.server.inference.messages import pb
from tests.inference.requests import METHOD, MODEL, Caller, answered, declared, outputs, parameters, raw_request, typed, typed_request
from tests.support.engine import EXPERTS, HIDDEN, X
from tests.support.servers import run

LARGE = torch.arange(8192.0 * HIDDEN).view(-1, HIDDEN)  # 512 KiB
ROUTED = {"topk_ids": torch.tensor([[0, 1], [2, 3], [3, 0]]), "topk_weights": torch.full((3, 2), 0.25)}
ALL = ("hidden_states", "requested", "topk_ids", "topk_weights", "drop_reasons", "dropped_tokens")


@pytest.mark.parametrize("rows", [X, X[:0], LARGE], ids=["few", "none", "many"])
def test_numbers_are_answered_by_numbers_and_bytes_by_bytes(caller: Caller, rows: torch.Tensor) -> None:
    from_numbers, from_bytes = (caller.infer(make(hidden_states=rows)) for make in (typed_request, raw_request))
    assert not from_numbers.raw_output_contents
    assert not any(output.HasField("contents") for output in from_bytes.outputs)
    for response in (from_numbers, from_bytes):
        found = answered(response)
        assert torch.equal(found["hidden_states"], rows)
        assert found["requested"].tolist() == ([1, 2, 3, 4] if len(rows) else [0] * EXPERTS)


def test_every_kind_of_number(caller: Caller) -> None:
    tensors = {"hidden_states": X, "used_token": torch.tensor([True, False, True]), **ROUTED}
    for request in (typed_request(**tensors), raw_request(**tensors), raw_request(**{**tensors, "topk_ids": ROUTED["topk_ids"].int()})):
        request.outputs.extend(outputs(*ALL))
        found = answered(caller.infer(request))
        assert list(found) == list(ALL)
        assert found["topk_ids"].tolist() == [[0, 1], [-1, -1], [3, 0]]
        assert found["topk_weights"].tolist() == [[0.25, 0.25], [0, 0], [0.25, 0.25]]
        assert found["drop_reasons"].dtype is torch.int32


def test_large_numbers_of_numbers(caller: Caller) -> None:
    """As any encoder may put them: packed in one piece or in several."""
    ids = (torch.arange(2 * len(LARGE)) % 2).view(-1, 2)
    request = typed_request(hidden_states=LARGE, topk_ids=ids, topk_weights=torch.ones(len(LARGE), 2))
    assert torch.equal(answered(caller.infer(request))["hidden_states"], LARGE)
    data = LARGE.numpy().tobytes()
    contents = b"".join(b"".join(length_delimited(6, part)) for part in (data[: len(data) // 2], b"", data[len(data) // 2 :]))
    whole = declared("hidden_states", LARGE).SerializeToString() + b"".join(length_delimited(5, contents))
    message = b"".join((*length_delimited(1, MODEL.encode()), *length_delimited(5, whole)))
    assert torch.equal(answered(caller.infer(message))["hidden_states"], LARGE)


def test_what_a_request_changes_of_the_gate_is_read(caller: Caller) -> None:
    request = raw_request(hidden_states=X)
    request.model_name = "tiny/1"
    for name, parameter in parameters(capacity_factor=2.0, noise="jitter", seed=3).items():
        request.parameters[name].CopyFrom(parameter)
    assert torch.equal(answered(caller.infer(request))["hidden_states"], X + 1)
    request.parameters["capacity_factor"].int64_param = 2
    caller.infer(request)


def changed(**fields: object) -> Callable[[], Any]:
    """A request whose only input is like this."""

    def make() -> Any:
        request = raw_request(hidden_states=X)
        for name, value in fields.items():
            if name == "shape":
                request.inputs[0].shape[:] = value
            else:
                setattr(request.inputs[0], name, value)
        return request

    return make


def with_parameters(**values: object) -> Callable[[], Any]:
    def make() -> Any:
        request = raw_request(hidden_states=X)
        for name, parameter in parameters(**values).items():
            request.parameters[name].CopyFrom(parameter)
        return request

    return make


def of(*inputs: Any, raws: int = 0) -> Callable[[], Any]:
    return lambda: pb.ModelInferRequest(model_name=MODEL, inputs=inputs, raw_input_contents=[X.numpy().tobytes()] * raws)


def with_another(name: str, dtype: torch.dtype) -> Callable[[], Any]:
    """A request with a second input, of this type."""
    return lambda: raw_request(**{"hidden_states": X, name: torch.zeros(3, dtype=dtype)})


def wrong_numbers() -> Any:
    wrong = typed("hidden_states", X)
    wrong.contents.int64_contents.append(1)
    return wrong


def few_numbers() -> Any:
    request = typed_request(hidden_states=X)
    del request.inputs[0].contents.fp32_contents[-1]
    return request


def with_outputs(*names: str) -> Any:
    request = raw_request(hidden_states=X)
    request.outputs.extend(outputs(*names))
    return request


def empty_parameter() -> Any:
    request = raw_request(hidden_states=X)
    request.parameters["timeout"].SetInParent()
    return request


def with_input_parameter(**values: object) -> Any:
    return pb.ModelInferRequest(model_name=MODEL, inputs=[declared("hidden_states", X, **values)])


def many_empty() -> Any:
    """A few bytes each, which would be many in memory: the contents of one input are 1.5 million bools."""
    return b"".join(length_delimited(5, *length_delimited(5, *length_delimited(1, bytes(1_500_000)))))


HALF = typed("hidden_states", X)
HALF.datatype = "FP16"
SHARED = declared("hidden_states", X, shared_memory_region="none", shared_memory_byte_size=X.numel() * 4)
BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "no inputs": (of(), "hidden_states is missing"),
    "only another input": (lambda: raw_request(used_token=torch.ones(3, dtype=torch.bool)), "hidden_states is missing"),
    "an unknown input": (changed(name="input_ids"), "no input 'input_ids'"),
    "an input without a name": (changed(name=""), "no input ''"),
    "an input twice": (of(declared("hidden_states", X), declared("hidden_states", X), raws=2), "given twice"),
    "an unknown datatype": (changed(datatype="FP8"), "datatype 'FP8'"),
    "no datatype": (changed(datatype=""), "datatype ''"),
    "a datatype that is not for this input": (changed(datatype="INT32"), "datatype 'INT32'; allowed: FP32, FP16, BF16"),
    "FP64": (changed(datatype="FP64"), "datatype 'FP64'; allowed: FP32, FP16, BF16"),
    "a mask of numbers": (with_another("used_token", torch.int64), "datatype 'INT64'; allowed: BOOL"),
    "ids that are no whole numbers": (with_another("topk_ids", torch.float32), "datatype 'FP32'; allowed: INT64, INT32"),
    "weights that are whole numbers": (with_another("topk_weights", torch.int64), "datatype 'INT64'; allowed: FP32, FP16, BF16"),
    "token ids that are no whole numbers": (with_another("token_ids", torch.float32), "datatype 'FP32'; allowed: INT64, INT32"),
    "a negative size": (changed(shape=[-3, 16]), "none of them negative"),
    "negative sizes": (changed(shape=[-3, -16]), "none of them negative"),
    "a huge size": (changed(shape=[2**62, 16]), "does not take exactly that many"),
    "huge sizes and a 0": (changed(shape=[2**62, 2**62, 0]), "does not take exactly that many"),
    "another shape": (changed(shape=[4, 16]), "does not take exactly that many"),
    "another hidden size": (changed(shape=[16, 3]), "takes [tokens, 16]"),
    "no shape": (changed(shape=[]), "does not take exactly that many"),
    "many sizes": (changed(shape=[1] * 200), "at most 8 sizes"),
    "contents and raw contents": (of(typed("hidden_states", X), raws=1), "send all inputs one way"),
    "contents of one, raw contents of another": (
        of(typed("hidden_states", X), declared("used_token", torch.ones(3, dtype=torch.bool)), raws=1),
        "send all inputs one way",
    ),
    "contents of one only": (of(typed("hidden_states", X), declared("used_token", torch.ones(3, dtype=torch.bool))), "0 numbers"),
    "no data": (of(declared("hidden_states", X)), "has no data"),
    "more raw contents than inputs": (of(declared("hidden_states", X), raws=2), "1 raw_input_contents more"),
    "raw contents that are too short": (
        lambda: pb.ModelInferRequest(model_name=MODEL, inputs=[declared("hidden_states", X)], raw_input_contents=[b"\0" * 7]),
        "has 7 bytes",
    ),
    "FP16 as numbers": (of(HALF), "FP16, which has no contents"),
    "numbers of two kinds": (of(wrong_numbers()), "int64_contents"),
    "too few numbers": (few_numbers, "47 numbers"),
    "an output twice": (lambda: with_outputs("requested", "requested"), "asked for twice"),
    "an unknown output": (lambda: with_outputs("hidden_states", "Hidden_states"), "no output 'Hidden_states'"),
    "an output without a name": (lambda: with_outputs(""), "no output ''"),
    "ids without weights": (lambda: raw_request(hidden_states=X, topk_ids=ROUTED["topk_ids"]), "topk_weights is not given"),
    "ids of no expert": (lambda: raw_request(hidden_states=X, **{**ROUTED, "topk_ids": ROUTED["topk_ids"] + 9}), "has experts 0..3"),
    "not finite": (lambda: raw_request(hidden_states=X / 0), "not finite"),
    "a parameter without a value": (empty_parameter, "timeout"),
    "a timeout that is no number": (with_parameters(timeout=True), "timeout"),
    "a negative seed": (with_parameters(seed=-1), "seed"),
    "an unknown parameter": (with_parameters(priority=1), "'priority'"),
    "a parameter of an input": (lambda: with_input_parameter(binary_data_size=4), "'binary_data_size'"),
    "half of where shared memory is": (lambda: with_input_parameter(shared_memory_byte_size=192), "needs shared_memory_region"),
    "shared memory before its beginning": (
        lambda: with_input_parameter(shared_memory_region="a", shared_memory_byte_size=192, shared_memory_offset=-1),
        "not negative",
    ),
    "a region of no name": (of(SHARED), "not registered"),
    "a large message that is none": (lambda: b"\x2a" * 200_000, "message"),
    "a small message that is none": (lambda: b"\xff" * 20, "not a protobuf request"),
    "many inputs": (of(*[declared("hidden_states", X)] * 500, raws=1), "given twice"),
    "a large message with many inputs": (lambda: of(*[declared("hidden_states", X)] * 5_000)().SerializeToString(), "message"),
    "many empty numbers": (many_empty, "bytes beside raw contents"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_requests_are_refused_with_a_sentence(caller: Caller, what: str) -> None:
    make, said = BAD[what]
    code, sentence = caller.refused(make())
    assert (code, said in sentence) == ("INVALID_ARGUMENT", True), sentence
    assert len(sentence) < 600


async def test_a_stream_tells_which_request_there_was_no_room_for() -> None:
    running = await run(max_message_bytes=2**20, max_queued_bytes=2**20)
    running.engine.gate.clear()
    call = running.channel.stream_stream(f"{METHOD}ModelStreamInfer")()
    for name in ("first", "second"):
        request = raw_request(hidden_states=torch.zeros(10_000, HIDDEN))
        request.id = name
        await call.write(request.SerializeToString())
    await call.done_writing()
    assert await running.observed.until(1) == [("ModelStreamInfer", "RESOURCE_EXHAUSTED")]
    running.engine.gate.set()
    first, second = [pb.ModelStreamInferResponse.FromString(answer) async for answer in call]
    assert (first.infer_response.id, first.error_message) == ("first", "")
    assert (second.infer_response.id, "does not fit" in second.error_message) == ("second", True)
    await running.stop()


def test_a_stream_tells_of_every_failure_which_request_it_was(caller: Caller) -> None:
    requests = [make() for make, _ in BAD.values()]
    for number, request in enumerate(requests):
        if not isinstance(request, bytes):
            request.id = str(number)
    good = raw_request(hidden_states=X)
    good.id = "good"
    answers = caller.stream([*requests, good])
    for number, (request, answer) in enumerate(zip(requests, answers, strict=False)):
        assert answer.error_message
        assert answer.infer_response.id == ("" if isinstance(request, bytes) else str(number))
    assert (answers[-1].error_message, answers[-1].infer_response.id) == ("", "good")
    assert torch.equal(answered(answers[-1].infer_response)["hidden_states"], X)


def test_limits_are_those_of_forward(caller: Caller) -> None:
    code, sentence = caller.refused(raw_request(hidden_states=torch.zeros(65537, HIDDEN)))
    assert (code, "at most 65536" in sentence) == ("INVALID_ARGUMENT", True)
    code, _ = caller.refused(raw_request(hidden_states=torch.zeros(2**17 + 1, HIDDEN)))
    assert code == "RESOURCE_EXHAUSTED"


SOME_TENSORS = st.builds(
    lambda name, datatype, shape, contents: pb.ModelInferRequest.InferInputTensor(
        name=name, datatype=datatype, shape=shape, contents=contents
    ),
    st.sampled_from(["hidden_states", "used_token", "topk_ids", "topk_weights", "token_ids", "", "x"]),
    st.sampled_from(["FP32", "FP16", "BF16", "INT64", "INT32", "BOOL", "FP64", "BYTES", ""]),
    st.lists(st.sampled_from([0, 1, 2, 3, 16, -1, 2**31, 2**62, -(2**63)]), max_size=10),
    st.none()
    | st.builds(
        pb.InferTensorContents,
        fp32_contents=st.lists(st.floats(width=32), max_size=3),
        int64_contents=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=3),
        bytes_contents=st.lists(st.binary(max_size=2), max_size=1),
    ),
)
SOME_REQUESTS = st.builds(
    lambda inputs, raws, names, keys: pb.ModelInferRequest(
        inputs=inputs, raw_input_contents=raws, outputs=outputs(*names), parameters=parameters(**dict.fromkeys(keys, 2**62))
    ).SerializeToString(),
    st.lists(SOME_TENSORS, max_size=4),
    st.lists(st.binary(max_size=200), max_size=4),
    st.lists(st.sampled_from(["hidden_states", "requested", "topk_ids", "no"]), max_size=3),
    st.lists(st.sampled_from(["timeout", "seed", "noise", "capacity_factor", "x"]), max_size=2),
)
#: By name, because hypothesis writes down what it draws from where a draw comes to nothing, and warns of what is long.
MESSAGES = raw_request(hidden_states=LARGE), typed_request(hidden_states=LARGE), typed_request(hidden_states=X, **ROUTED)
VALID = {name: message.SerializeToString() for name, message in zip(("raw", "typed", "routed"), MESSAGES, strict=True)}


@given(
    message=SOME_REQUESTS
    | st.binary(max_size=300)
    | st.builds(
        lambda valid, at, byte, end: VALID[valid][:at] + bytes([byte]) + VALID[valid][at + 1 : end],
        st.sampled_from(sorted(VALID)),
        st.integers(0, 200),
        st.integers(0, 255),
        st.sampled_from([100, 70_000, 400_000, None]),
    )
)
def test_any_bytes_are_decoded_or_refused(message: bytes) -> None:
    try:
        decoded = decode(parse(message))
    except MoEServeError as error:
        assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    else:
        assert "hidden_states" in decoded.tensors or "hidden_states" in decoded.shared
        assert decoded.wanted
