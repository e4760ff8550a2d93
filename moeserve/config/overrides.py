"""The changes of one request to its layer's gating, if the operator allows them."""

from __future__ import annotations

import math
import re
from functools import lru_cache
from typing import Any, NamedTuple

from pydantic import ValidationError

from moeserve.config.gating import GatingConfig
from moeserve.errors import InvalidRequest


class GatingOverrides(NamedTuple):
    """Fields of GatingConfig for one request, None = the layer's own; capacity_factor infinity = no limit."""

    capacity_factor: float | None = None
    noise: str | None = None
    seed: int | None = None


_NONE = GatingOverrides()
#: field of a request -> the value in `request_overrides` that allows it
_ALLOWED_BY = {"capacity_factor": "capacity_factor", "noise": "noise", "seed": "noise"}


def override(gating: GatingConfig, overrides: GatingOverrides) -> GatingConfig:
    """The gating of a request with `overrides`; `gating` itself where there are none. Another noise takes its own default noise_scale.

    Raises InvalidRequest, naming the field, for what `gating.request_overrides` does not allow or GatingConfig would refuse.
    """
    return gating if overrides == _NONE else _override(gating, overrides)


# A gating is looked up twice per request, when it is checked and when it runs; clients tend to use the same few.
@lru_cache(maxsize=256)
def _override(gating: GatingConfig, overrides: GatingOverrides) -> GatingConfig:
    changes = {name: value for name, value in overrides._asdict().items() if value is not None}
    for name in changes:
        if _ALLOWED_BY[name] not in gating.request_overrides:
            raise InvalidRequest(
                f"{name} cannot be set by requests to this layer; gating.request_overrides must contain {_ALLOWED_BY[name]!r}", name
            )
    if changes.get("capacity_factor") == math.inf:
        changes["capacity_factor"] = None
    if changes.get("noise", gating.noise) != gating.noise:
        changes["noise_scale"] = None
    try:
        return GatingConfig.model_validate({**gating.model_dump(), **changes})
    except ValidationError as error:
        raise _invalid(error) from None


def _invalid(error: ValidationError) -> InvalidRequest:
    first: Any = error.errors()[0]
    if first["loc"]:
        field = first["loc"][0]
        return InvalidRequest(f"{field}: {first['msg']} (got {first['input']!r})", field)
    sentence = first["msg"].removeprefix("Value error, ")
    named = (field for field in re.findall(r"gating\.(\w+)", sentence) if field in GatingOverrides._fields)
    return InvalidRequest(sentence, next(named, ""))
