"""What moeserve must know beyond the parameters of the other systems: of what size and kind an expert is."""

from __future__ import annotations

from typing import Any, get_args

from moeserve.compat.table import FLAG, Case, Param, Values, one_of, optional, same, whole
from moeserve.config import ActivationName

ASSUMED_HIDDEN_SIZE = 1024


def hidden_size_extra() -> Param:
    """For systems whose MoE configuration does not say how wide the model is."""
    key = "layers.hidden_size"
    assumed = Case(
        "note",
        f"not part of the original configuration; {ASSUMED_HIDDEN_SIZE} is assumed",
        None,
        "not given",
        when=lambda values: values["hidden_size"] is None,
        unasked=True,
    )
    chosen = Case("effect", f"`{key}`", 64, sets=lambda values: {key: hidden_size(values, "hidden_size")})
    return Param("hidden_size", optional(whole(1)), None, [chosen, assumed])


def hidden_size(values: Values, name: str) -> int:
    """H as the configuration has it, or the assumed one."""
    size: int = ASSUMED_HIDDEN_SIZE if values[name] is None else values[name]
    return size


def expert_extras(hidden: str, intermediate: bool = True) -> list[Param]:
    """Beside the original parameters; `hidden` is the parameter that says how wide the model is."""
    params: list[Param] = [
        same("activation", one_of(*get_args(ActivationName)), "swiglu", "layers.activation", "gelu", "the experts' activation"),
        same("bias", FLAG, False, "layers.bias", True, "whether the experts' projections have one"),
        same("seed", whole(0), 0, "layers.seed", 7, "of the weights, and of whatever is drawn by chance"),
    ]
    if intermediate:
        params.insert(0, _intermediate_size(hidden))
    return params


def intermediate_size(values: Values, hidden: str) -> int:
    """I as the configuration has it, or 4 H."""
    size: int | None = values["intermediate_size"]
    return 4 * hidden_size(values, hidden) if size is None else size


def _intermediate_size(hidden: str) -> Param:
    key = "layers.intermediate_size"

    def chosen(values: Values) -> dict[str, Any]:
        return {key: intermediate_size(values, hidden)}

    assumed = Case(
        "note",
        f"not part of the original configuration; 4 * {hidden} is assumed",
        None,
        "not given",
        when=lambda values: values["intermediate_size"] is None,
        unasked=True,
    )
    return Param("intermediate_size", optional(whole(1)), None, [Case("effect", f"`{key}`", 96, sets=chosen), assumed])
