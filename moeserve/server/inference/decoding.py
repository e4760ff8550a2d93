"""A ModelInferRequest, from bytes to what it asks for. Everything in it is a stranger's.

The data of large tensors is cut out of the message before protobuf sees it, so that it is not copied, and so that a small message cannot
become a large one in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Final

import numpy as np
import torch
from google.protobuf.message import DecodeError

from moeserve.api.protobuf import MAX_SMALL_BYTES, Buffer, length_delimited, scan, tag
from moeserve.api.tensors import nbytes, view
from moeserve.errors import InvalidRequest
from moeserve.server.inference.datatypes import Datatype
from moeserve.server.inference.messages import pb
from moeserve.server.inference.parameters import RAW_SIZE, Options, Shared, of_input, options_of, shared_of
from moeserve.server.inference.tensors import INPUTS, OUTPUTS, Output

#: of a large message: what protobuf parses, that is everything but raw contents and FP32 contents
_MAX_PARSED_BYTES: Final = 2**20
_MAX_DIMS: Final = 8

_INPUTS: Final = pb.ModelInferRequest.INPUTS_FIELD_NUMBER
_RAW_TAG: Final = int.from_bytes(tag(pb.ModelInferRequest.RAW_INPUT_CONTENTS_FIELD_NUMBER), "little")
_CONTENTS: Final = pb.ModelInferRequest.InferInputTensor.CONTENTS_FIELD_NUMBER
_FLOATS: Final = pb.InferTensorContents.FP32_CONTENTS_FIELD_NUMBER


@dataclass(frozen=True)
class InferMessage:
    """`raw`: the raw contents. `floats`: by input, the pieces of its FP32 contents that `parsed` does not have. `nbytes`: of it all."""

    parsed: pb.ModelInferRequest
    raw: Sequence[Buffer]
    floats: Mapping[int, Sequence[Buffer]]
    nbytes: int


@dataclass(frozen=True)
class InShared:
    """A tensor that is still to be read."""

    datatype: Datatype
    shape: Sequence[int]
    where: Shared


@dataclass(frozen=True)
class WantedOutput:
    """An output, and where it is to be written; None = into the answer."""

    output: Output
    where: Shared | None = None


@dataclass(frozen=True)
class InferRequest:
    """`is_typed`: the caller sends numbers, not bytes, and gets numbers."""

    tensors: Mapping[str, torch.Tensor]
    shared: Mapping[str, InShared]
    wanted: Sequence[WantedOutput]
    options: Options
    is_typed: bool


def parse(message: bytes) -> InferMessage:
    """The message, if it is one. Raises InvalidRequest."""
    raw: list[Buffer] = []
    floats: dict[int, list[Buffer]] = {}
    kept = message if len(message) <= MAX_SMALL_BYTES else b"".join(_cut(memoryview(message), raw, floats))
    if len(kept) > _MAX_PARSED_BYTES:
        raise InvalidRequest(f"the request has {len(kept)} bytes beside raw contents and FP32 contents; allowed: {_MAX_PARSED_BYTES}")
    try:
        parsed = pb.ModelInferRequest.FromString(kept)
    except DecodeError:
        raise InvalidRequest(f"{len(message)} bytes are not a protobuf request of ModelInfer") from None
    return InferMessage(parsed, raw or parsed.raw_input_contents, floats, len(message))


def id_of(message: bytes) -> str:
    """The id of a request that may be wrong in every other way; "" when it is unreadable."""
    try:
        return parse(message).parsed.id
    except InvalidRequest:
        return ""


def _cut(message: memoryview, raw: list[Buffer], floats: dict[int, list[Buffer]]) -> Iterator[Buffer]:
    """What is left of `message`."""
    for key, start, body, end in scan(message, 0, len(message)):
        if key == _RAW_TAG:
            raw.append(message[body:end])
        elif key == _INPUTS << 3 | 2:
            pieces = floats[len(floats)] = []
            yield from _without(message, body, end, (_INPUTS, _CONTENTS, _FLOATS), pieces)
        else:
            yield message[start:end]


def _without(message: memoryview, start: int, end: int, path: Sequence[int], cut: list[Buffer]) -> Sequence[Buffer]:
    """The field `path[0]` with its body from `start` to `end`, without the fields at `path[1:]` in it, whose bodies are added to `cut`."""
    if len(path) == 1:
        cut.append(message[start:end])
        return ()
    kept: list[Buffer] = []
    for key, at, body, stop in scan(message, start, end):
        is_on_path = key == path[1] << 3 | 2
        kept += _without(message, body, stop, path[1:], cut) if is_on_path else (message[at:stop],)
    return length_delimited(path[0], *kept)


def decode(message: InferMessage) -> InferRequest:
    """What it asks for. Raises InvalidRequest."""
    request = message.parsed
    is_typed = any(each.HasField("contents") for each in request.inputs)
    if is_typed and message.raw:
        raise InvalidRequest("the request has both contents and raw_input_contents; send all inputs one way", "raw_input_contents")
    raw, tensors, shared = iter(message.raw), dict[str, torch.Tensor](), dict[str, InShared]()
    for index, each in enumerate(request.inputs):
        datatype = _datatype_of(each, tensors.keys() | shared.keys())
        where, stated = of_input(each.parameters, f"input {each.name}")
        if stated is not None and stated != (takes := nbytes(each.shape, datatype.dtype)):
            raise InvalidRequest(f"parameter {RAW_SIZE!r} of input {each.name} is {stated}; its shape takes {takes} bytes", each.name)
        if where is not None:
            shared[each.name] = _in_shared(each, datatype, where)
        elif is_typed:
            tensors[each.name] = _typed(each, datatype, message.floats.get(index, ()))
        else:
            tensors[each.name] = view(_next(raw, each.name, len(message.raw)), list(each.shape), datatype.dtype, each.name)
    if (more := sum(1 for _ in raw)) > 0:
        raise InvalidRequest(f"there are {more} raw_input_contents more than inputs that need them", "raw_input_contents")
    if "hidden_states" not in tensors and "hidden_states" not in shared:
        raise InvalidRequest("input hidden_states is missing", "hidden_states")
    return InferRequest(tensors, shared, _wanted(request), options_of(request.parameters), is_typed)


def _datatype_of(tensor: Any, earlier: Any) -> Datatype:
    name = tensor.name
    if name not in INPUTS:
        raise InvalidRequest(f"there is no input {name[:80]!r}; allowed: {', '.join(INPUTS)}", "inputs")
    if name in earlier:
        raise InvalidRequest(f"input {name} is given twice", name)
    allowed = {each.name: each for each in INPUTS[name].allowed}
    datatype = allowed.get(tensor.datatype)
    if datatype is None:
        raise InvalidRequest(f"input {name} has datatype {tensor.datatype[:80]!r}; allowed: {', '.join(allowed)}", name)
    if len(tensor.shape) > _MAX_DIMS or any(size < 0 for size in tensor.shape):
        raise InvalidRequest(
            f"input {name} has shape {list(tensor.shape[:_MAX_DIMS])}; allowed: at most {_MAX_DIMS} sizes, none of them negative", name
        )
    return datatype


def _next(raw: Iterator[Buffer], name: str, given: int) -> Buffer:
    found = next(raw, None)
    if found is None:
        raise InvalidRequest(f"input {name} has no data: there are only {given} raw_input_contents", name)
    return found


def _in_shared(tensor: Any, datatype: Datatype, where: Shared) -> InShared:
    if tensor.HasField("contents"):
        raise InvalidRequest(f"input {tensor.name} has contents and is in shared memory; allowed: one of them", tensor.name)
    shape = list(tensor.shape)
    if nbytes(shape, datatype.dtype) != where.nbytes:
        raise InvalidRequest(
            f"input {tensor.name} has shared_memory_byte_size {where.nbytes}, but shape {shape} of {datatype.name} does not take exactly "
            "that many",
            tensor.name,
        )
    return InShared(datatype, shape, where)


def _typed(tensor: Any, datatype: Datatype, floats: Sequence[Buffer]) -> torch.Tensor:
    name, shape, contents = tensor.name, list(tensor.shape), tensor.contents
    if datatype.contents is None:
        raise InvalidRequest(f"input {name} is {datatype.name}, which has no contents: send it in raw_input_contents", name)
    given = {field.name for field, _ in contents.ListFields()} | ({"fp32_contents"} if any(map(len, floats)) else set())
    if given - {datatype.contents}:
        raise InvalidRequest(f"input {name} is {datatype.name} and has {', '.join(sorted(given))}; allowed: {datatype.contents}", name)
    numbers = getattr(contents, datatype.contents)
    if any(map(len, floats)):
        if len(numbers):
            raise InvalidRequest(f"input {name} has its fp32_contents in several encodings; send them packed", name)
        return view(floats[0] if len(floats) == 1 else b"".join(floats), shape, datatype.dtype, name)
    if len(numbers) != prod(shape):
        raise InvalidRequest(f"input {name} has {len(numbers)} numbers; its shape {shape} takes {prod(shape)}", name)
    array: np.ndarray[Any, Any] = np.fromiter(numbers, dtype=_NUMPY[datatype.contents], count=len(numbers))
    return view(array.tobytes(), shape, datatype.dtype, name)


_NUMPY: Final = {"fp32_contents": np.float32, "int64_contents": np.int64, "int_contents": np.int32, "bool_contents": np.bool_}


def _wanted(request: pb.ModelInferRequest) -> Sequence[WantedOutput]:
    if not request.outputs:
        return [WantedOutput(output) for output in OUTPUTS.values() if output.is_default]
    wanted: dict[str, WantedOutput] = {}
    for each in request.outputs:
        if each.name not in OUTPUTS:
            raise InvalidRequest(f"there is no output {each.name[:80]!r}; allowed: {', '.join(OUTPUTS)}", "outputs")
        if each.name in wanted:
            raise InvalidRequest(f"output {each.name} is asked for twice", "outputs")
        wanted[each.name] = WantedOutput(OUTPUTS[each.name], shared_of(each.parameters, f"output {each.name}"))
    return list(wanted.values())
