"""What the wire format allows a sender, read as protobuf reads it: fields in pieces and in any order, said twice, packed or not, unknown.

T tokens, H hidden size, E experts, K choices per token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from moeserve.api.output import ForwardOutput
from moeserve.api.tensors import WIRE_DTYPES, raw
from moeserve.api.wire import decode_forward_request, decode_forward_response
from moeserve.v1 import moe_service_pb2 as pb
from moeserve.v1 import tensor_pb2

from .messages import OVERRIDES, REQUEST_TENSORS, RESPONSE_TENSORS, nested, varint

DATA_BYTES = [0, 8, 8184, 8192, 8200, 140_000]
REQUIRED = ("hidden_states", "requested", "processed", "dropped", "dropped_tokens")
# A number, eight bytes, four bytes, a text, and a group with fields in it that are none of ours.
UNKNOWN = [
    varint(100 << 3) + varint(2**64 - 1),
    varint(100 << 3 | 1) + bytes(8),
    varint(2**29 - 1 << 3 | 5) + bytes(4),
    nested(100, b"abc"),
    varint(100 << 3 | 3) + nested(5, nested(3, bytes(9000))) + nested(3, b"xyz") + varint(100 << 3 | 4),
    varint(3 << 3 | 3) + varint(5 << 3 | 3) + varint(5 << 3 | 4) + varint(3 << 3 | 4),
]


@st.composite
def interleaved(draw: st.DrawFn, streams: Sequence[Sequence[bytes]]) -> list[bytes]:
    """All pieces in some order that keeps the order of each stream."""
    order = draw(st.permutations([number for number, stream in enumerate(streams) for _ in stream]))
    rest = [iter(stream) for stream in streams]
    return [next(rest[number]) for number in order]


@st.composite
def tensor_pieces(draw: st.DrawFn, number: int) -> list[bytes]:
    """A tensor field, once or several times; put together it is one that we take."""
    dtype, size = draw(st.sampled_from(sorted(WIRE_DTYPES))), draw(st.sampled_from(DATA_BYTES))
    shape = draw(st.sampled_from([[size // WIRE_DTYPES[dtype].itemsize], [1, size // WIRE_DTYPES[dtype].itemsize, 1]]))
    dtypes = [*draw(st.lists(st.integers(0, 300), max_size=1)), dtype]
    # What is overruled has no need to be right.
    data = [*(bytes(draw(st.sampled_from(DATA_BYTES))) for _ in range(draw(st.integers(0, 2)))), draw(st.binary(min_size=8, max_size=8))]
    data[-1] = (data[-1] * (size // 8 + 1))[:size]
    cut = draw(st.integers(0, len(shape)))
    dims = [nested(2, b"".join(map(varint, shape[:cut]))), *(varint(2 << 3) + varint(dim) for dim in shape[cut:])]
    streams = [[varint(1 << 3) + varint(each) for each in dtypes], dims, [nested(3, each) for each in data]]
    pieces = draw(interleaved([*streams, draw(st.lists(st.sampled_from(UNKNOWN), max_size=1))]))
    cuts = sorted(draw(st.lists(st.integers(0, len(pieces)), max_size=2)))
    return [nested(number, b"".join(pieces[start:end])) for start, end in zip([0, *cuts], [*cuts, len(pieces)], strict=True)]


@st.composite
def messages(draw: st.DrawFn, kind: type[Message], tensors: Sequence[str], others: Sequence[Message]) -> bytes:
    numbers = [kind.DESCRIPTOR.fields_by_name[name].number for name in tensors]
    streams = [draw(tensor_pieces(number)) for number in numbers]
    streams += [[each.SerializeToString() for each in others]]
    return b"".join(draw(interleaved([*streams, draw(st.lists(st.sampled_from(UNKNOWN), max_size=2))])))


def assert_same(ours: torch.Tensor | None, message: Message, name: str) -> None:
    assert (ours is not None) == message.HasField(name)
    if ours is not None:
        stated = getattr(message, name)
        assert (ours.dtype, list(ours.shape)) == (WIRE_DTYPES[stated.dtype], list(stated.shape))
        assert raw(ours).tobytes() == stated.data


SCALARS_OF_REQUEST = [
    pb.ForwardRequest(request_id="a", model="m", return_routing=True),
    pb.ForwardRequest(request_id="é" * 50),
    pb.ForwardRequest(layer_index=0),
    pb.ForwardRequest(layer_name=""),
    pb.ForwardRequest(layer_index=2**32 - 1, seed=2**64 - 1),
    pb.ForwardRequest(capacity_factor=float("inf"), noise="none"),
    pb.ForwardRequest(capacity_factor=0.0, noise="", seed=0),
]


@given(st.data())
def test_requests_in_pieces(draw: st.DataObject) -> None:
    tensors = ["hidden_states", *draw.draw(st.lists(st.sampled_from(REQUEST_TENSORS[1:]), max_size=2, unique=True))]
    scalars = draw.draw(st.lists(st.sampled_from(SCALARS_OF_REQUEST), max_size=4))
    data = draw.draw(messages(pb.ForwardRequest, tensors, scalars))
    message, ours = pb.ForwardRequest.FromString(data), decode_forward_request(data)
    assert (ours.request_id, ours.model, ours.return_routing) == (message.request_id, message.model, message.return_routing)
    layer = message.WhichOneof("layer")
    assert ours.layer == (getattr(message, layer) if layer else None)
    for name in OVERRIDES:
        assert getattr(ours, name) == (getattr(message, name) if message.HasField(name) else None)
    for name in REQUEST_TENSORS:
        assert_same(getattr(ours, name), message, name)


SCALARS_OF_RESPONSE = [
    pb.ForwardResponse(request_id="a", aux_loss=1.5),
    pb.ForwardResponse(z_loss=-0.0, model_revision=2**64 - 1),
    pb.ForwardResponse(aux_loss=float("inf"), request_id="b"),
]


@given(st.data())
def test_answers_in_pieces(draw: st.DataObject) -> None:
    tensors = draw.draw(st.lists(st.sampled_from(RESPONSE_TENSORS), max_size=3, unique=True))
    counts = tensor_pb2.Tensor(dtype=4, shape=[1], data=bytes(8))
    whole = [pb.ForwardResponse(**{name: counts}) for name in REQUIRED if name not in tensors]
    scalars = draw.draw(st.lists(st.sampled_from(SCALARS_OF_RESPONSE), max_size=4))
    data = draw.draw(messages(pb.ForwardResponse, tensors, [*whole, *scalars]))
    message, ours = pb.ForwardResponse.FromString(data), decode_forward_response(data)
    assert ours.request_id == message.request_id
    assert isinstance(ours.result, ForwardOutput)
    assert (ours.result.aux_loss, ours.result.z_loss) == (message.aux_loss, message.z_loss)
    assert ours.result.model_revision == (message.model_revision or 1)
    for name in RESPONSE_TENSORS:
        assert_same(getattr(ours.result, name), message, name)
