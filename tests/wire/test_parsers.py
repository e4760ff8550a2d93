"""What others read of what we write: every field is there once, in the order of the numbers, whatever its size.

T tokens, H hidden size, E experts, K choices per token.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from zlib import crc32

import pytest
import torch

from moeserve.api.output import ForwardOutput
from moeserve.api.tensors import WIRE_DTYPES, WIRE_NUMBERS, raw
from moeserve.api.wire import WireRequest, decode_forward_request, encode_forward_request, encode_forward_response
from moeserve.errors import NonFiniteOutput
from moeserve.v1 import moe_service_pb2 as pb

from . import read_by_protobuf

Expected = dict[str, object]

REPOSITORY = Path(__file__).parents[2]
# Whatever the codec does differently above some size, it begins at one of these, or next to it.
SIZES_BYTES = [2**power for power in range(10, 19)]
DTYPES = list(WIRE_DTYPES.values())
SMALL_MESSAGE_BYTES = 128 * 1024


def some(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return (torch.arange(torch.Size(shape).numel()) % 100).view(shape).to(dtype)


def shapes(dtype: torch.dtype) -> Iterator[tuple[int, ...]]:
    yield from ((), (0,), (1,), (0, 64), (1, 0), (1, 64), (2, 3, 5))
    for size in SIZES_BYTES:
        yield from ((1, size // dtype.itemsize + more) for more in (-1, 0, 1))


def expected(**fields: object) -> Expected:
    """As `what_is_in` would say it."""
    found: Expected = {}
    for name, value in fields.items():
        if not isinstance(value, torch.Tensor):
            found[name] = value
            continue
        data = raw(value).tobytes()
        rest = {"shape": list(value.shape)} if value.dim() else {}
        found[name] = {"dtype": WIRE_NUMBERS[value.dtype], **rest, **({"data": [len(data), crc32(data)]} if data else {})}
    return found


def answers() -> Iterator[tuple[str, bytes, Expected]]:
    small = torch.arange(8)
    for dtype in DTYPES:
        for shape in shapes(dtype):
            for where in ("hidden_states", "processed", "topk_weights", "drop_reasons"):
                tensors = dict.fromkeys(("hidden_states", "requested", "processed", "dropped", "dropped_tokens"), small)
                tensors |= dict.fromkeys(("topk_ids", "topk_weights", "slots", "drop_reasons"), small)
                tensors[where] = some(shape, dtype)
                data = encode_forward_response("id", ForwardOutput(**tensors, aux_loss=0.5, z_loss=0.25, model_revision=3))
                yield "ForwardResponse", data, expected(request_id="id", aux_loss=0.5, z_loss=0.25, model_revision=3, **tensors)
    large = torch.zeros(3000, 8)
    output = ForwardOutput(*[large] * 5, 0.0, 0.0, *[large] * 4)
    tensors = {name: value for name, value in vars(output).items() if isinstance(value, torch.Tensor)}
    yield "ForwardResponse", encode_forward_response("", output), expected(**tensors, model_revision=1)
    failed = NonFiniteOutput("x" * 20_000)
    said = {"code": failed.code.value[0], "message": str(failed)}
    yield "ForwardResponse", encode_forward_response("id", failed), expected(request_id="id", error=said)


def requests() -> Iterator[tuple[str, bytes, Expected]]:
    scalars = {"request_id": "id", "model": "tiny", "return_routing": True, "capacity_factor": 0.0, "noise": "", "seed": 0}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for shape in shapes(dtype):
            tensors = {"hidden_states": some(shape, dtype)}
            yield "ForwardRequest", encode_forward_request(WireRequest(**tensors)), expected(layer_index=0, **tensors)
            tokens = shape[0] if shape else 1
            ids = some((tokens * 500, 2), torch.int64)
            tensors |= {"used_token": some((tokens,), torch.bool), "topk_ids": ids, "topk_weights": ids.float(), "token_ids": ids.int()}
            data = encode_forward_request(WireRequest(**tensors, **scalars, layer="mlp"))
            yield "ForwardRequest", data, expected(**scalars, layer_name="mlp", **tensors)


@pytest.fixture(scope="module")
def cases() -> list[tuple[str, bytes, Expected]]:
    return [*requests(), *answers()]


def varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position


def numbers(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Number and body of every field, with nothing but the wire format at hand."""
    position = 0
    while position < len(data):
        key, position = varint(data, position)
        kind, size = key & 7, 0
        if kind == 2:
            size, position = varint(data, position)
        elif kind == 0:
            _, position = varint(data, position)
        else:
            size = {1: 8, 5: 4}[kind]
        yield key >> 3, data[position : position + size]
        position += size
    assert position == len(data)


def test_every_field_is_there_once_and_in_order(cases: list[tuple[str, bytes, Expected]]) -> None:
    for name, data, fields in cases:
        found = list(numbers(data))
        kind = getattr(pb, name).DESCRIPTOR
        assert [number for number, _ in found] == sorted(kind.fields_by_name[field].number for field in fields)
        for number, body in found:
            if kind.fields_by_number[number].message_type is not None:
                inner = [number for number, _ in numbers(body)]
                assert inner == sorted(set(inner)), (name, fields)


@pytest.mark.parametrize("parser", ["upb", "python"])
def test_all_parsers_of_protobuf_read_the_same(cases: list[tuple[str, bytes, Expected]], parser: str, tmp_path: Path) -> None:
    file = tmp_path / "messages"
    with file.open("wb") as out:
        for name, data, _ in cases:
            out.write(read_by_protobuf.HEADER.pack(name.encode(), len(data)) + data)
    environment = os.environ | {"PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": parser}
    command = [sys.executable, "-m", read_by_protobuf.__name__, file]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120, check=True)
    used, *lines = done.stdout.splitlines()
    assert used == parser
    for (_, _, fields), line in zip(cases, lines, strict=True):
        # Written again by protobuf, the message is the same to the byte: there was nothing to merge and nothing unknown in it.
        assert json.loads(line) == {"fields": fields, "written_alike": True}


@pytest.mark.parametrize("more_bytes", [-1, 0, 1])
def test_messages_as_large_as_the_largest_that_is_copied(more_bytes: int) -> None:
    size_bytes = SMALL_MESSAGE_BYTES + more_bytes
    hidden_states = some((1, size_bytes // 2 - 40), torch.bfloat16)
    missing = size_bytes - len(encode_forward_request(WireRequest(hidden_states, request_id="x"))) + 1
    data = encode_forward_request(WireRequest(hidden_states, request_id="x" * missing))
    assert len(data) == size_bytes
    assert torch.equal(decode_forward_request(data).hidden_states, hidden_states)
    assert pb.ForwardRequest.FromString(data).SerializeToString() == data
