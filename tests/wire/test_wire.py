"""Our codec against stock protobuf: the same bytes mean the same, both ways, and no bytes do harm.

T tokens, H hidden size, E experts, K choices per token.
"""

from __future__ import annotations

import grpc
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moeserve.api.output import ForwardOutput
from moeserve.api.tensors import WIRE_DTYPES, raw
from moeserve.api.wire import (
    WireRequest,
    decode_forward_request,
    decode_forward_response,
    encode_forward_request,
    encode_forward_response,
)
from moeserve.errors import InvalidRequest, MoEServeError, Overloaded
from moeserve.v1 import moe_service_pb2 as pb
from moeserve.v1 import tensor_pb2

from .messages import OVERRIDES, REQUEST_TENSORS, RESPONSE_TENSORS, ROUTING_TENSORS, nested, some_output

DTYPES = {name: number for number, name in WIRE_DTYPES.items()}
# Above 128 KiB a message is split by hand, below protobuf copies it: every property must hold for both.
tokens = st.sampled_from([0, 1, 3, 1500])
floats = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


def stock(tensor: torch.Tensor) -> tensor_pb2.Tensor:
    return tensor_pb2.Tensor(dtype=DTYPES[tensor.dtype], shape=tensor.shape, data=raw(tensor).tobytes())


def assert_same(ours: torch.Tensor | None, message: tensor_pb2.Tensor | None) -> None:
    if message is None:
        assert ours is None
        return
    assert ours is not None
    assert (DTYPES[ours.dtype], list(ours.shape), raw(ours).tobytes()) == (message.dtype, list(message.shape), message.data)


def field(message: pb.ForwardRequest | pb.ForwardResponse, name: str) -> tensor_pb2.Tensor | None:
    return getattr(message, name) if message.HasField(name) else None


@st.composite
def requests(draw: st.DrawFn) -> WireRequest:
    num_tokens, generator = draw(tokens), torch.Generator().manual_seed(draw(st.integers(0, 99)))
    hidden_states = torch.randn(num_tokens, 64, generator=generator).to(draw(floats))
    routed = draw(st.booleans())
    return WireRequest(
        hidden_states=hidden_states,
        layer=draw(st.one_of(st.none(), st.integers(0, 2**32 - 1), st.text(max_size=20))),
        used_token=torch.rand(num_tokens, generator=generator) > 0.5 if draw(st.booleans()) else None,
        topk_ids=torch.randint(0, 8, (num_tokens, 2), generator=generator) if routed else None,
        topk_weights=torch.rand(num_tokens, 2, generator=generator) if routed else None,
        return_routing=draw(st.booleans()),
        request_id=draw(st.text(max_size=40)),
        model=draw(st.text(max_size=10)),
        token_ids=torch.randint(0, 2**32, (num_tokens,), generator=generator) if draw(st.booleans()) else None,
        capacity_factor=draw(st.none() | st.floats(allow_nan=False)),
        noise=draw(st.none() | st.text(max_size=10)),
        seed=draw(st.none() | st.integers(0, 2**64 - 1)),
    )


@given(requests())
def test_stock_protobuf_reads_what_we_write(request: WireRequest) -> None:
    message = pb.ForwardRequest.FromString(encode_forward_request(request))
    assert (message.request_id, message.model, message.return_routing) == (request.request_id, request.model, request.return_routing)
    chosen = message.WhichOneof("layer")
    assert (getattr(message, chosen) if chosen else None) == request.layer
    for name in REQUEST_TENSORS:
        assert_same(getattr(request, name), field(message, name))
    for name in OVERRIDES:
        assert (getattr(message, name) if message.HasField(name) else None) == getattr(request, name)


@given(requests())
def test_we_read_what_stock_protobuf_writes(request: WireRequest) -> None:
    message = pb.ForwardRequest(request_id=request.request_id, model=request.model, return_routing=request.return_routing)
    if isinstance(request.layer, int):
        message.layer_index = request.layer
    elif request.layer is not None:
        message.layer_name = request.layer
    for name in REQUEST_TENSORS:
        if getattr(request, name) is not None:
            getattr(message, name).CopyFrom(stock(getattr(request, name)))
    for name in OVERRIDES:
        if getattr(request, name) is not None:
            setattr(message, name, getattr(request, name))
    ours = decode_forward_request(message.SerializeToString())
    for name, value in vars(request).items():
        if isinstance(value, torch.Tensor):
            assert_same(getattr(ours, name), stock(value))
        else:
            assert getattr(ours, name) == value


@given(tokens, st.booleans(), floats)
def test_answers_mean_the_same_both_ways(num_tokens: int, routing: bool, dtype: torch.dtype) -> None:
    output = some_output(num_tokens, routing, dtype)
    data = encode_forward_response("id", output)
    message = pb.ForwardResponse.FromString(data)
    assert (message.request_id, message.aux_loss, message.z_loss, message.HasField("error")) == ("id", 1.25, 0.5, False)
    for answer in (decode_forward_response(data), decode_forward_response(message.SerializeToString())):
        assert answer.request_id == "id"
        assert isinstance(answer.result, ForwardOutput)
        for name in RESPONSE_TENSORS:
            assert_same(getattr(output, name), field(message, name))
            assert_same(getattr(answer.result, name), field(message, name))


def test_an_error_answer_is_the_exception_itself() -> None:
    answer = decode_forward_response(encode_forward_response("7", Overloaded("too much")))
    assert answer.request_id == "7"
    assert isinstance(answer.result, Overloaded)
    assert str(answer.result) == "too much"
    unknown = pb.ForwardResponse(error=pb.Error(code=4711, message="what?")).SerializeToString()
    assert type(decode_forward_response(unknown).result) is MoEServeError


@st.composite
def split_messages(draw: st.DrawFn) -> bytes:
    """hidden_states in several pieces, in any order, some overruled by later ones, with unknown fields in between."""
    data = bytes(draw(st.sampled_from([0, 2, 256, 200_000])))
    pieces = [
        tensor_pb2.Tensor(dtype=draw(st.sampled_from([1, 3]))).SerializeToString(),
        tensor_pb2.Tensor(shape=[len(data) // 2]).SerializeToString(),
        tensor_pb2.Tensor(data=data).SerializeToString(),
        tensor_pb2.Tensor(data=b"overruled, or the last word").SerializeToString(),
        tensor_pb2.Tensor(data=bytes(draw(st.sampled_from([1, 150_000])))).SerializeToString(),
        b"\x18\x07",  # field 3 as a number: unknown, not data
        b"\x7a\x03abc" + b"\x7d1234" + b"\x7912345678",  # unknown fields of every size
    ]
    order = draw(st.permutations(pieces))
    cuts = draw(st.lists(st.integers(0, len(order)), max_size=3).map(sorted))
    message = b""
    for start, end in zip([0, *cuts], [*cuts, len(order)], strict=True):
        message += nested(5, b"".join(order[start:end])) + draw(st.sampled_from([b"", nested(1, b"id"), b"\x18\x05", nested(6, b"")]))
    return message


def assert_agrees_with_stock(data: bytes) -> None:
    """What we accept, stock protobuf accepts and reads alike; what we refuse is refused with InvalidRequest."""
    try:
        ours = decode_forward_request(data)
    except InvalidRequest:
        return
    message = pb.ForwardRequest.FromString(data)
    assert (ours.request_id, ours.model) == (message.request_id, message.model)
    for name in REQUEST_TENSORS:
        assert_same(getattr(ours, name), field(message, name))


@given(split_messages())
def test_split_tensors_merge_as_in_stock_protobuf(data: bytes) -> None:
    message = pb.ForwardRequest.FromString(data)
    tensor = message.hidden_states
    size = {1: 4, 3: 2}.get(tensor.dtype, 0)
    if size and list(tensor.shape) == [len(tensor.data) // size] and len(tensor.data) % size == 0 and not message.HasField("used_token"):
        assert_same(decode_forward_request(data).hidden_states, tensor)
    else:
        assert_agrees_with_stock(data)


@given(st.binary(max_size=200), st.booleans())
def test_random_bytes_are_refused_or_understood(data: bytes, large: bool) -> None:
    assert_agrees_with_stock(data + (nested(5, nested(3, bytes(200_000))) if large else b""))
    try:
        decode_forward_response(data)
    except MoEServeError as error:
        assert type(error) is MoEServeError


@given(requests(), st.data())
def test_damaged_messages_are_refused_or_understood(request: WireRequest, draw: st.DataObject) -> None:
    data = bytearray(encode_forward_request(request))
    for _ in range(draw.draw(st.integers(1, 4))):
        data[draw.draw(st.integers(0, min(len(data) - 1, 60)))] = draw.draw(st.integers(0, 255))
    assert_agrees_with_stock(bytes(data))
    assert_agrees_with_stock(bytes(data[: draw.draw(st.integers(0, len(data)))]))


@pytest.mark.parametrize("num_tokens", [3, 1500])
def test_every_truncation_of_the_last_tensor_is_refused(num_tokens: int) -> None:
    data = encode_forward_request(WireRequest(torch.ones(num_tokens, 64)))
    for length in {1, 2, len(data) // 2, len(data) - 64, len(data) - 1}:
        with pytest.raises(InvalidRequest):
            decode_forward_request(data[:length])


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        (pb.ForwardRequest(), "hidden_states is missing"),
        (pb.ForwardRequest(hidden_states=tensor_pb2.Tensor(shape=[0, 4])), "dtype number 0"),
        (pb.ForwardRequest(hidden_states=tensor_pb2.Tensor(dtype=1, shape=[2**30, 2**30], data=b"1234")), "does not take exactly"),
        (pb.ForwardRequest(hidden_states=tensor_pb2.Tensor(dtype=1, shape=[0, 2**62, 2**62])), "does not take exactly"),
        (pb.ForwardRequest(hidden_states=tensor_pb2.Tensor(dtype=1, shape=[1] * 9, data=b"1234")), "9 dimensions"),
        (pb.ForwardRequest(hidden_states=tensor_pb2.Tensor(dtype=1, shape=[-1, -1], data=b"1234")), "does not take exactly"),
        (pb.ForwardRequest(hidden_states=tensor_pb2.Tensor(dtype=1, shape=[2], data=b"1234")), "does not take exactly"),
    ],
)
def test_shapes_that_lie_are_refused_by_name(message: pb.ForwardRequest, sentence: str) -> None:
    with pytest.raises(InvalidRequest, match=sentence) as caught:
        decode_forward_request(message.SerializeToString())
    assert [violation.field for violation in caught.value.violations] == ["hidden_states"]


@pytest.mark.parametrize("field_of_request", [nested(5, b""), nested(5, nested(3, b"") * 60), nested(2, b"x" * 200_000)])
def test_messages_made_to_be_slow_are_refused(field_of_request: bytes) -> None:
    with pytest.raises(InvalidRequest, match="message"):
        decode_forward_request(field_of_request * (8 * 2**20 // len(field_of_request)))


def test_decoding_a_large_tensor_copies_nothing() -> None:
    data = encode_forward_request(WireRequest(torch.ones(1024, 64)))
    first, second = (decode_forward_request(data).hidden_states for _ in range(2))
    assert first.data_ptr() == second.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 3000])
def test_a_view_that_is_only_said_to_be_negative_has_its_values(num_tokens: int, dtype: torch.dtype) -> None:
    rows = torch.randn(num_tokens, 64).to(dtype)
    sent = encode_forward_request(WireRequest(torch._neg_view(rows)))
    assert torch.equal(decode_forward_request(sent).hidden_states, -rows)


def test_keeping_the_counts_does_not_keep_the_answer() -> None:
    data = encode_forward_response("", some_output(1500))
    answer = decode_forward_response(data).result
    assert isinstance(answer, ForwardOutput)
    start = torch.frombuffer(data, dtype=torch.uint8).data_ptr()
    inside = {name for name in RESPONSE_TENSORS if start <= getattr(answer, name).data_ptr() < start + len(data)}
    assert inside == {"hidden_states", *ROUTING_TENSORS}


def test_a_response_without_its_tensors_is_the_servers_mistake() -> None:
    with pytest.raises(MoEServeError, match=r"the server's answer cannot be read: it has no dropped, dropped_tokens, ") as caught:
        decode_forward_response(pb.ForwardResponse(request_id="1").SerializeToString())
    assert caught.value.code is grpc.StatusCode.INTERNAL


def test_only_what_the_wire_knows_is_sent() -> None:
    with pytest.raises(InvalidRequest, match="hidden_states is float64"):
        encode_forward_request(WireRequest(torch.zeros(1, 4, dtype=torch.float64)))
    with pytest.raises(InvalidRequest, match="layer is -1"):
        encode_forward_request(WireRequest(torch.zeros(1, 4), layer=-1))
    for name, value in (("capacity_factor", "much"), ("noise", 1), ("seed", -1), ("seed", 2**64), ("seed", 0.5)):
        with pytest.raises(InvalidRequest, match=f"{name} is {value!r}, which cannot be sent"):
            encode_forward_request(WireRequest(torch.zeros(1, 4), **{name: value}))
    for name, value in (("capacity_factor", 10**309), ("return_routing", 2**63)):
        with pytest.raises(InvalidRequest, match=f"{name} is {str(value)[:19]}.*, which cannot be sent"):
            encode_forward_request(WireRequest(torch.zeros(1, 4), **{name: value}))
    with pytest.raises(InvalidRequest, match="seed is a number of too many digits, which cannot be sent"):
        encode_forward_request(WireRequest(torch.zeros(1, 4), seed=10**5000))
    request = WireRequest(torch.zeros(1, 4), topk_ids=torch.zeros(1, 1), topk_weights=torch.ones(1, 1, dtype=torch.bfloat16))
    assert decode_forward_request(encode_forward_request(request)).topk_weights == torch.ones(1, 1)
