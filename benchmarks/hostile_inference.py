"""Messages of the Open Inference Protocol that no client of it would send, from the same source as the others."""

from __future__ import annotations

from functools import cache
from typing import Any, Final

import torch
from hostile import EDGES, FLOATS, Hostile
from running import EXPERTS, HIDDEN, LAYERS

from moeserve.api.tensors import raw
from moeserve.server.inference.messages import pb

_NAMES: Final = ("hidden_states", "hidden_states", "used_token", "topk_ids", "topk_weights", "token_ids", "input_ids", "")
_DATATYPES: Final = ("FP32", "FP32", "FP16", "BF16", "INT64", "INT32", "BOOL", "FP64", "BYTES", "")
_OUTPUTS: Final = ("hidden_states", "requested", "topk_ids", "drop_reasons", "aux_loss", "logits", "")
_SHARED: Final = ("shared_memory_region", "shared_memory_byte_size", "shared_memory_offset")
_PARAMETERS: Final = ("seed", "noise", "capacity_factor", *_SHARED, "priority")
_KEYS: Final = ("/moeserve", "../../etc/passwd", "/", ".", "", "a/b", "\0", "x" * 300, "no-such-object")
_MODEL: Final = "moe"  # of a service whose layers come from seeds


@cache
def _valid() -> list[bytes]:
    inputs = torch.ones(3, HIDDEN), torch.ones(700, HIDDEN)
    return [_request(f"{_MODEL}/{layer}", rows).SerializeToString() for rows in inputs for layer in range(LAYERS)]


def _request(model: str, rows: torch.Tensor) -> Any:
    tensor = pb.ModelInferRequest.InferInputTensor(name="hidden_states", datatype="FP32", shape=rows.shape)
    return pb.ModelInferRequest(model_name=model, inputs=[tensor], raw_input_contents=[raw(rows).tobytes()])


class HostileInference:
    """`source` is where its chances come from."""

    def __init__(self, source: Hostile) -> None:
        self._source, self._chance = source, source.chance

    def infer(self) -> bytes:
        """For ModelInfer and ModelStreamInfer."""
        chance = self._chance
        valid = bytearray(chance.choice(_valid()))
        kind = chance.randrange(10)
        if kind == 0:
            return self._source.noise(0, 1, 5, 50, 500, 200_000)
        if kind == 1:
            return bytes(valid[: chance.randrange(len(valid))])
        if kind in (2, 3):
            return self._source.changed(valid)
        if kind == 4:
            return bytes(valid) + self._structured()
        return self._structured()

    def asked(self) -> tuple[str, bytes]:
        """Another method, and what it is asked."""
        chance, text = self._chance, self._source.text()[:5000]
        size = chance.choice((0, 1, 4096, 2**63, 2**64 - 1))
        region: dict[str, Any] = {"name": text, "key": chance.choice(_KEYS), "offset": size, "byte_size": size}
        asked = {
            "ModelReady": pb.ModelReadyRequest(name=text, version=self._source.text()[:300]),
            "ModelMetadata": pb.ModelMetadataRequest(name=text),
            "ModelStatistics": pb.ModelStatisticsRequest(name=text),
            "RepositoryIndex": pb.RepositoryIndexRequest(repository_name=text),
            "SystemSharedMemoryRegister": pb.SystemSharedMemoryRegisterRequest(**region),
            "SystemSharedMemoryStatus": pb.SystemSharedMemoryStatusRequest(name=text),
            "SystemSharedMemoryUnregister": pb.SystemSharedMemoryUnregisterRequest(name=text),
        }
        method = chance.choice(tuple(asked))
        message = self._source.noise(1, 3, 20, 300) if chance.random() < 0.3 else asked[method].SerializeToString()
        return f"inference.GRPCInferenceService/{method}", message

    def _structured(self) -> bytes:
        chance = self._chance
        request = pb.ModelInferRequest(model_name=chance.choice((f"{_MODEL}/0", f"{_MODEL}/layers.1", f"{_MODEL}/9", "")))
        if chance.random() < 0.1:
            request.id = self._source.text()
        for _ in range(chance.choice((1, 1, 2, 3, 100))):
            self._add_input(request)
        for name in chance.choices(_OUTPUTS, k=chance.choice((0, 0, 1, 3))):
            self._set_some(request.outputs.add(name=name).parameters)
        self._set_some(request.parameters)
        return request.SerializeToString()

    def _add_input(self, request: Any) -> None:
        chance, rows = self._chance, self._chance.choice((0, 1, 3, 50))
        tensor = request.inputs.add(name=chance.choice(_NAMES), datatype=chance.choice(_DATATYPES))
        count = rows * HIDDEN
        tensor.shape.extend([rows, HIDDEN] if chance.random() < 0.7 else chance.choices(EDGES, k=chance.choice((0, 1, 2, 9, 200))))
        self._set_some(tensor.parameters)
        if chance.random() < 0.3:
            tensor.contents.fp32_contents.extend(chance.choices(FLOATS, k=count))
        if chance.random() < 0.1:
            tensor.contents.int64_contents.extend(chance.choices((0, 1, -1, EXPERTS, 2**63 - 1), k=count))
        if chance.random() < 0.6:
            request.raw_input_contents.append(bytes(max(0, count * chance.choice((1, 2, 4, 4, 8)) + chance.choice((0, 0, 0, 1, -1)))))

    def _set_some(self, parameters: Any) -> None:
        chance = self._chance
        for name in chance.choices(_PARAMETERS, k=chance.choice((0, 0, 0, 1, 3))):
            chosen = parameters[name]
            kind = chance.choice(("bool_param", "int64_param", "string_param", "double_param", "none"))
            values = {"bool_param": True, "int64_param": chance.choice((0, 1, -1, 2**63 - 1)), "string_param": self._source.text()[:5000]}
            if kind != "none":
                setattr(chosen, kind, values.get(kind, chance.choice(FLOATS)))
