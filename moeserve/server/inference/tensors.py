"""What a layer takes and gives by this protocol: names, datatypes, shapes.

T tokens, H hidden size, E experts, K choices per token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import torch

from moeserve.api.output import ForwardOutput
from moeserve.config import BY_TOKEN_ID, LayerSpec
from moeserve.server.inference.datatypes import DATATYPES, Datatype

Size = Literal["T", "H", "E", "K", "1"]


@dataclass(frozen=True)
class Tensor:
    """`datatype`: as metadata say; the hidden_states of an answer have that of its request."""

    name: str
    datatype: Datatype
    sizes: Sequence[Size]

    def shape(self, spec: LayerSpec) -> list[int]:
        """-1 = any size."""
        known = {"H": spec.hidden_size, "E": spec.num_experts, "1": 1}
        return [known.get(size, -1) for size in self.sizes]


@dataclass(frozen=True)
class Input(Tensor):
    """`allowed`: the datatypes that it may have, of which `datatype` is the first."""

    allowed: Sequence[Datatype]


@dataclass(frozen=True)
class Output(Tensor):
    """`of` an answer. Those that are `routing` are made only on request."""

    of: Callable[[ForwardOutput], torch.Tensor | None]
    is_default: bool = False
    is_routing: bool = False


def _named(name: str, datatype: str, *sizes: Size, is_default: bool = False, is_routing: bool = False) -> Output:
    def of(output: ForwardOutput) -> torch.Tensor | None:
        value = getattr(output, name)
        return value if value is None or isinstance(value, torch.Tensor) else torch.tensor([value], dtype=DATATYPES[datatype].dtype)

    return Output(name, DATATYPES[datatype], sizes, of, is_default, is_routing)


def _given(name: str, datatypes: Sequence[str], *sizes: Size) -> Input:
    allowed = [DATATYPES[each] for each in datatypes]
    return Input(name, allowed[0], sizes, allowed)


_FLOATS: Final = ("FP32", "FP16", "BF16")
_INTEGERS: Final = ("INT64", "INT32")

INPUTS: Final[Mapping[str, Input]] = {
    tensor.name: tensor
    for tensor in (
        _given("hidden_states", _FLOATS, "T", "H"),
        _given("used_token", ("BOOL",), "T"),
        _given("topk_ids", _INTEGERS, "T", "K"),
        _given("topk_weights", _FLOATS, "T", "K"),
        _given("token_ids", _INTEGERS, "T"),
    )
}
OUTPUTS: Final[Mapping[str, Output]] = {
    output.name: output
    for output in (
        _named("hidden_states", "FP32", "T", "H", is_default=True),
        _named("requested", "INT64", "E", is_default=True),
        _named("processed", "INT64", "E", is_default=True),
        _named("dropped", "INT64", "E", is_default=True),
        _named("dropped_tokens", "BOOL", "T"),
        _named("aux_loss", "FP32", "1"),
        _named("z_loss", "FP32", "1"),
        _named("model_revision", "INT64", "1"),
        _named("topk_ids", "INT64", "T", "K", is_routing=True),
        _named("topk_weights", "FP32", "T", "K", is_routing=True),
        _named("slots", "INT64", "T", "K", is_routing=True),
        _named("drop_reasons", "INT32", "T", "K", is_routing=True),
    )
}


def required_inputs(spec: LayerSpec) -> list[str]:
    """The names of those that every request for a layer must have."""
    by_caller = ["topk_ids", "topk_weights"] if spec.gating.routing == "caller" else []
    return ["hidden_states", *by_caller, *(["token_ids"] if spec.gating.routing in BY_TOKEN_ID else [])]
