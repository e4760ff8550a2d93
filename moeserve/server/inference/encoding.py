"""Answers of this protocol, from tensors to bytes: what protobuf would write, without handing it the data of large tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

from moeserve.api.protobuf import Buffer, length_delimited
from moeserve.api.tensors import raw
from moeserve.server.inference.datatypes import BY_DTYPE
from moeserve.server.inference.decoding import WantedOutput
from moeserve.server.inference.messages import pb
from moeserve.server.inference.parameters import FINAL_RESPONSE, in_shared

VERSION: Final = "1"

_OUTPUTS: Final = pb.ModelInferResponse.OUTPUTS_FIELD_NUMBER
_RAW: Final = pb.ModelInferResponse.RAW_OUTPUT_CONTENTS_FIELD_NUMBER
_CONTENTS: Final = pb.ModelInferResponse.InferOutputTensor.CONTENTS_FIELD_NUMBER
_FLOATS: Final = pb.InferTensorContents.FP32_CONTENTS_FIELD_NUMBER
_ANSWER: Final = pb.ModelStreamInferResponse.INFER_RESPONSE_FIELD_NUMBER


def encode(request: pb.ModelInferRequest, answer: Sequence[tuple[WantedOutput, torch.Tensor]], *, is_typed: bool) -> list[Buffer]:
    """A ModelInferResponse in pieces. Tensors that are wanted in shared memory are only described.

    Clients find the raw contents of an output by its position among all outputs, so one in shared memory has empty ones. `is_typed`: as
    numbers, unless one of the outputs has a datatype without numbers: it may have come by shared memory beside inputs of numbers.
    """
    is_typed = is_typed and all(BY_DTYPE[tensor.dtype].contents for wanted, tensor in answer if wanted.where is None)
    head = pb.ModelInferResponse(model_name=request.model_name, model_version=VERSION, id=request.id)
    described: list[Buffer] = []
    data: list[Buffer] = []
    for wanted, tensor in answer:
        output = pb.ModelInferResponse.InferOutputTensor(name=wanted.output.name, datatype=BY_DTYPE[tensor.dtype].name, shape=tensor.shape)
        contents: tuple[Buffer, ...] = ()
        if wanted.where is not None:
            in_shared(output.parameters, wanted.where)
        if not is_typed:
            data += length_delimited(_RAW, raw(tensor) if wanted.where is None else b"")
        elif wanted.where is None:
            contents = length_delimited(_CONTENTS, *_numbers(tensor))
        described += length_delimited(_OUTPUTS, output.SerializeToString(), *contents)
    return [head.SerializeToString(), *described, *data]


def _numbers(tensor: torch.Tensor) -> tuple[Buffer, ...]:
    if tensor.dtype is torch.float32:
        return length_delimited(_FLOATS, raw(tensor))
    contents = BY_DTYPE[tensor.dtype].contents
    assert contents is not None, "an answer of numbers has none that are only sent raw"
    return (pb.InferTensorContents(**{contents: tensor.flatten().tolist()}).SerializeToString(),)


def in_stream(response: Sequence[Buffer]) -> list[Buffer]:
    """The ModelStreamInferResponse of a request that was answered."""
    final = pb.ModelInferResponse()
    final.parameters[FINAL_RESPONSE].bool_param = True
    return list(length_delimited(_ANSWER, *response, final.SerializeToString()))


def failed_in_stream(sentence: str, request_id: str) -> bytes:
    """The ModelStreamInferResponse of a request that failed."""
    return pb.ModelStreamInferResponse(error_message=sentence, infer_response=pb.ModelInferResponse(id=request_id)).SerializeToString()
