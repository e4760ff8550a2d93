"""Which of the served layers is meant: the only place that knows what a position and a name are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from moeserve.errors import InvalidRequest, UnknownLayer

_MAX_NAMES: Final = 8


def check_layer(layer: object) -> None:
    """Raises InvalidRequest for what cannot be sent as a position or a name."""
    _require_kind(layer)
    if isinstance(layer, int) and not 0 <= layer < 2**32:
        raise InvalidRequest(f"layer is {layer}; layers count from 0", "layer")


def find_layer(names: Sequence[str], layer: int | str) -> int:
    """The position of a layer among those of these names, in model order. Raises InvalidRequest, or UnknownLayer when it is not there."""
    _require_kind(layer)
    if isinstance(layer, str):
        try:
            return names.index(layer)
        except ValueError:
            raise UnknownLayer(f"there is no layer {layer[:80]!r}; served: {_listed(names)}") from None
    if not 0 <= layer < len(names):
        raise UnknownLayer(f"there is no layer {layer}; served: 0..{len(names) - 1} ({_listed(names)})")
    return layer


def _require_kind(layer: object) -> None:
    # True is an int, and no position.
    if isinstance(layer, bool) or not isinstance(layer, int | str):
        raise InvalidRequest(f"layer must be a position or a name, got {type(layer).__name__}", "layer")


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(names[:_MAX_NAMES]) + more
