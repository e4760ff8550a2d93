"""Names of the activations between the two projections of an expert."""

from __future__ import annotations

import re
from functools import lru_cache
from math import isfinite
from typing import Annotated, Final, Literal, get_args

from pydantic import AfterValidator

ActivationName = Literal["swiglu", "swiglu_post", "swigluoai", "geglu", "geglu_tanh", "gelu", "relu", "relu2"]
#: those that may clamp their two halves, and the limit they have when none is given
LIMITED: Final[dict[ActivationName, float | None]] = {"swiglu": None, "swiglu_post": None, "swigluoai": 7.0}

_WRITTEN: Final = re.compile(r"(\w+)(?:\(([^()]+)\))?")


@lru_cache
def parsed_activation(activation: str) -> tuple[ActivationName, float | None]:
    """Name and limit of an activation, as "swiglu(10)" has them; None = no limit. Raises ValueError."""
    match = _WRITTEN.fullmatch(activation)
    name = match[1] if match else activation
    if name not in get_args(ActivationName):
        raise ValueError(f"activation is {activation!r}; allowed: {', '.join(get_args(ActivationName))}, or with a limit: {_with_limits()}")
    known: ActivationName = name  # type: ignore[assignment]
    if match is None or match[2] is None:
        return known, LIMITED.get(known)
    if known not in LIMITED or not _is_limit(match[2]):
        raise ValueError(f"activation is {activation!r}; allowed with a limit, a positive number: {_with_limits()}")
    return known, float(match[2])


def _checked(activation: str) -> str:
    try:
        parsed_activation(activation)
    except ValueError as error:
        raise ValueError(f"layers.{error}") from None
    return activation


def _is_limit(text: str) -> bool:
    try:
        return float(text) > 0 and isfinite(float(text))
    except ValueError:
        return False


def _with_limits() -> str:
    return ", ".join(f"{name}(L)" for name in LIMITED)


#: a name, or for those of LIMITED "name(limit)"
Activation = Annotated[str, AfterValidator(_checked)]
