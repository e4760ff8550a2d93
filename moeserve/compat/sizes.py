"""What moeserve must know beyond the parameters of the other systems: of what size and kind an expert is."""

from __future__ import annotations

from typing import get_args

from moeserve.compat.accepts import FLAG, Values, one_of, optional, whole
from moeserve.compat.table import Computed, Param, assumed, effect, same
from moeserve.config import ActivationName

_ASSUMED_HIDDEN_SIZE = 1024

#: for systems whose MoE configuration does not say how wide the model is
HIDDEN_SIZE = Param("hidden_size", optional(whole(1)), None).means(
    effect({"layers.hidden_size": Computed(lambda values: _hidden_size(values, "hidden_size"))}),
    assumed(f"not part of the original configuration; {_ASSUMED_HIDDEN_SIZE} is assumed"),
)

EXPERT_EXTRAS = [
    same("activation", one_of(*get_args(ActivationName)), "swiglu", "layers.activation", "the experts' activation"),
    same("bias", FLAG, False, "layers.bias", "whether the experts' projections have one"),
    same("seed", whole(0), 0, "layers.seed", "of the weights, and of all random choices"),
]


def sized_expert_extras(hidden: str) -> list[Param]:
    """For systems that do not say how large an expert is either; `hidden` is the parameter that says how wide the model is."""
    size = Param("intermediate_size", optional(whole(1)), None).means(
        effect({"layers.intermediate_size": Computed(lambda values: intermediate_size(values, hidden))}),
        assumed(f"not part of the original configuration; 4 * {hidden} is assumed"),
    )
    return [size, *EXPERT_EXTRAS]


def intermediate_size(values: Values, hidden: str) -> int:
    """I as the configuration has it, or 4 H."""
    size: int | None = values["intermediate_size"]
    return 4 * _hidden_size(values, hidden) if size is None else size


def _hidden_size(values: Values, name: str) -> int:
    size: int | None = values[name]
    return _ASSUMED_HIDDEN_SIZE if size is None else size
