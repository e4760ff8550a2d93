"""Requests of the Open Inference Protocol, and a caller made of its messages only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import grpc
import pytest
import torch

from moeserve.api.tensors import raw
from moeserve.server.inference.datatypes import BY_DTYPE, DATATYPES
from moeserve.server.inference.messages import pb
from tests.support.engine import X

METHOD = "/inference.GRPCInferenceService/"
MODEL = "tiny/model.layers.3.mlp"


def parameters(**values: object) -> dict[str, Any]:
    kinds = {bool: "bool_param", int: "int64_param", str: "string_param", float: "double_param"}
    return {name: pb.InferParameter(**{kinds[type(value)]: value}) for name, value in values.items()}


def declared(name: str, value: torch.Tensor, **given: object) -> Any:
    return pb.ModelInferRequest.InferInputTensor(
        name=name, datatype=BY_DTYPE[value.dtype].name, shape=value.shape, parameters=parameters(**given)
    )


def typed(name: str, value: torch.Tensor) -> Any:
    message = declared(name, value)
    contents = DATATYPES[message.datatype].contents
    getattr(message.contents, contents).extend(value.flatten().tolist())
    message.contents.SetInParent()
    return message


def raw_request(model: str = MODEL, **tensors: torch.Tensor) -> Any:
    return pb.ModelInferRequest(
        model_name=model,
        inputs=[declared(name, value) for name, value in tensors.items()],
        raw_input_contents=[raw(value).tobytes() for value in tensors.values()],
    )


def typed_request(**tensors: torch.Tensor) -> Any:
    return pb.ModelInferRequest(model_name=MODEL, inputs=[typed(name, value) for name, value in tensors.items()])


def outputs(*names: str) -> list[Any]:
    return [pb.ModelInferRequest.InferRequestedOutputTensor(name=name) for name in names]


def answered(response: Any) -> dict[str, torch.Tensor]:
    """The outputs by name, whichever way they came."""
    data, found = iter(response.raw_output_contents), {}
    for output in response.outputs:
        datatype = DATATYPES[output.datatype]
        if output.HasField("contents"):
            ((_, numbers),) = output.contents.ListFields() or [(None, [])]
            value = torch.tensor(list(numbers), dtype=datatype.dtype)
        else:
            content = bytearray(next(data))
            value = torch.frombuffer(content, dtype=datatype.dtype) if content else torch.empty(0, dtype=datatype.dtype)
        found[output.name] = value.view(list(output.shape))
    assert next(data, None) is None
    return found


class Caller:
    """Sends messages, or bytes, and gives messages back."""

    OPTIONS = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel

    def infer(self, request: Any, **options: Any) -> Any:
        message = request if isinstance(request, bytes) else request.SerializeToString()
        return pb.ModelInferResponse.FromString(self._channel.unary_unary(f"{METHOD}ModelInfer")(message, **options))

    def stream(self, requests: Iterable[Any]) -> Sequence[Any]:
        messages = (each if isinstance(each, bytes) else each.SerializeToString() for each in requests)
        return [pb.ModelStreamInferResponse.FromString(each) for each in self._channel.stream_stream(f"{METHOD}ModelStreamInfer")(messages)]

    def ask(self, method: str, **fields: object) -> Any:
        request, response = getattr(pb, f"{method}Request"), getattr(pb, f"{method}Response")
        return response.FromString(self._channel.unary_unary(METHOD + method)(request(**fields).SerializeToString()))

    def refused(self, request: Any, **options: Any) -> tuple[str, str]:
        """Code and sentence. The next request is answered as ever."""
        with pytest.raises(grpc.RpcError) as caught:
            self.infer(request, **options)
        assert torch.equal(answered(self.infer(raw_request(hidden_states=X)))["hidden_states"], X)
        return caught.value.code().name, caught.value.details()
