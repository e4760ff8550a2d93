"""The served layers as models of this protocol: MODEL/LAYER, one version, what they take and give."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, TypeVar

from moeserve.config import LayerSpec
from moeserve.errors import UnknownLayer
from moeserve.server.catalog import Catalog
from moeserve.server.inference.encoding import VERSION
from moeserve.server.inference.messages import pb
from moeserve.server.inference.tensors import INPUTS, OUTPUTS, Tensor, required_inputs

Kind = TypeVar("Kind", pb.ModelInput, pb.ModelOutput)

PLATFORM: Final = "moeserve"


def find(catalog: Catalog, name: str, version: str) -> int:
    """The position of the layer that a model is. Raises UnknownLayer."""
    if version not in ("", VERSION):
        raise UnknownLayer(f"model {name[:80]!r} has no version {version[:80]!r}; allowed: {VERSION!r}, or none")
    prefix, layer = f"{catalog.model}/", name.removeprefix(f"{catalog.model}/")
    if not name.startswith(prefix):
        raise UnknownLayer(f"model {name[:80]!r} is not served; models are called {prefix}LAYER, as RepositoryIndex lists them")
    is_number = layer.isascii() and layer.isdigit() and len(layer) < 10 and layer not in {spec.name for spec in catalog.layers}
    return catalog.resolve("", int(layer) if is_number else layer)


def name_of(catalog: Catalog, layer: int) -> str:
    """What the model of a layer is called."""
    return f"{catalog.model}/{catalog.layers[layer].name}"


def metadata(name: str, spec: LayerSpec) -> pb.ModelMetadataResponse:
    """What a request must have, and an answer has when it does not say."""

    def listed(tensors: Iterable[Tensor]) -> list[pb.ModelMetadataResponse.TensorMetadata]:
        of = pb.ModelMetadataResponse.TensorMetadata
        return [of(name=tensor.name, datatype=tensor.datatype.name, shape=tensor.shape(spec)) for tensor in tensors]

    return pb.ModelMetadataResponse(
        name=name,
        versions=[VERSION],
        platform=PLATFORM,
        inputs=listed(INPUTS[each] for each in required_inputs(spec)),
        outputs=listed(output for output in OUTPUTS.values() if output.is_default),
    )


def configuration(name: str, spec: LayerSpec) -> pb.ModelConfig:
    """The same; load generators want all tensors of one in the other."""

    def listed(kind: type[Kind], tensors: Iterable[Tensor]) -> list[Kind]:
        return [kind(name=each.name, data_type=each.datatype.config, dims=each.shape(spec)) for each in tensors]

    inputs = listed(pb.ModelInput, (INPUTS[each] for each in required_inputs(spec)))
    outputs = listed(pb.ModelOutput, (output for output in OUTPUTS.values() if output.is_default))
    return pb.ModelConfig(name=name, platform=PLATFORM, backend=PLATFORM, input=inputs, output=outputs)
