"""What frontends have counted, as messages, and what of it the controller's own frontend has shown already."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Final

from moeserve.config import MAX_EXPERTS, MAX_LAYERS
from moeserve.control.record import require_printable, require_short
from moeserve.errors import InvalidRequest
from moeserve.observe.counted import Counted, LayerCounted
from moeserve.observe.metrics import Metrics
from moeserve.v1 import control_service_pb2 as pb

log = logging.getLogger(__name__)

#: bounds on messages, far above those of any frontend
_MAX_SERIES: Final = 1024
_MAX_LABELS: Final = 8
_MAX_LABEL_CHARS: Final = 256
_MAX_VALUES: Final = 64
_MAX_REASONS: Final = 16


class Elsewhere:
    """Adds what other frontends have counted to `metrics`, each time what is new of it.

    keys: of the frontends that may still be heard. What others had counted is forgotten when a new one is heard: programs come and go.
    """

    def __init__(self, metrics: Metrics, keys: Callable[[], frozenset[str]]) -> None:
        self._metrics, self._keys = metrics, keys
        self._known: dict[str, Counted] = {}

    def take(self, key: str, counted: Counted) -> None:
        """All that the frontend of this key has counted by now."""
        before = self._known.get(key)
        if before is None:
            self._known = {known: self._known[known] for known in self._known.keys() & self._keys()}
        self._known[key] = counted  # what cannot be counted is not tried again either
        try:
            self._metrics.add(counted.since(before or Counted()))
        except (ValueError, KeyError) as error:
            log.warning("what a frontend has counted is not counted here: it has other layers or metrics: %s", error)


def counted_message(counted: Counted) -> pb.Counted:
    """For `read_counted`."""
    return pb.Counted(
        series=[pb.Series(key=key, values=values) for key, values in counted.series.items()],
        layers=[pb.LayerCounted(tokens=layer.tokens, pairs=layer.pairs) for layer in counted.layers],
    )


def read_counted(message: pb.Counted) -> Counted:
    """Raises InvalidRequest for what no frontend counts."""
    _require(len(message.series) <= _MAX_SERIES and len(message.layers) <= MAX_LAYERS, "fewer series and layers")
    for series in message.series:
        _require(1 <= len(series.key) <= _MAX_LABELS and 1 <= len(series.values) <= _MAX_VALUES, "a name and values in each series")
        _require(all(0 <= value < math.inf for value in series.values), "values of at least 0")
        for text in series.key:
            require_short(text, "counted.series.key", _MAX_LABEL_CHARS)
            require_printable(text, "counted.series.key")
    for layer in message.layers:
        _require(len(layer.pairs) <= _MAX_REASONS, "fewer reasons")
        _require(all(len(pairs) <= 8 * MAX_EXPERTS and len(pairs) % 8 == 0 for pairs in layer.pairs.values()), "8 bytes for each expert")
    return Counted(
        {tuple(series.key): tuple(series.values) for series in message.series},
        tuple(LayerCounted(layer.tokens, dict(layer.pairs)) for layer in message.layers),
    )


def _require(is_so: bool, allowed: str) -> None:
    if not is_so:
        raise InvalidRequest(f"counted is invalid; allowed: {allowed}", "counted")
