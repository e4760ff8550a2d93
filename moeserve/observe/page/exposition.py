"""Prometheus' text of a registry, as prometheus_client writes it, but for metrics of experts.

These may have tens of thousands of series, and the interpreter's time for a scrape is lost for requests.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric, Sample
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from moeserve.observe.expert_counts import ExpertFamily

#: a metric -> its text
Encode = Callable[[Metric], bytes]
#: a pause after so long lets waiting threads run; Python itself would make them wait for 5 ms
_WORK_S: Final = 1e-3
_PAUSE_S: Final = 50e-6


@dataclass(frozen=True)
class Exposition:
    """The body of an answer and its Content-Type."""

    content_type: str
    body: bytes


def expose(registry: CollectorRegistry, accept: str, names: Collection[str] = ()) -> Exposition:
    """In the format of `accept`, the header of a scrape; with `names`, only these series."""
    try:
        write, content_type = choose_encoder(accept)
    except TypeError:  # a version that is no number
        write, content_type = choose_encoder("")
    end = write(_Families())
    pieces, began = list[bytes](), time.perf_counter()
    for family in registry.collect():
        for piece in _pieces(family, lambda metric: write(_Families(metric)).removesuffix(end), names):
            pieces.append(piece)
            if time.perf_counter() - began > _WORK_S:
                time.sleep(_PAUSE_S)
                began = time.perf_counter()
    return Exposition(content_type, b"".join((*pieces, end)))


def _pieces(family: Metric, encode: Encode, names: Collection[str]) -> Iterator[bytes]:
    if isinstance(family, ExpertFamily):
        if not names or family.series_name in names:
            yield from _expert_lines(family, encode)
    elif not names:
        yield encode(family)
    elif samples := [sample for sample in family.samples if sample.name in names]:
        yield encode(_made_of(family, samples))


def _expert_lines(family: ExpertFamily, encode: Encode) -> Iterator[bytes]:
    """The library writes a line for each layer, of an expert without a name: the first label, as labels are sorted."""
    layers = [layer for layer in family.layers if layer.experts]
    one_each = [Sample(family.series_name, {"expert": "", **layer.labels}, 0) for layer in layers]
    *header, _ = encode(_made_of(family, ())).decode().split("\n")
    *lines, _ = encode(_made_of(family, one_each)).decode().split("\n")
    yield "".join(f"{line}\n" for line in header).encode()
    for line, layer in zip(lines[len(header) :], layers, strict=True):
        start, _, rest = line.removesuffix("0.0").partition('""')
        yield "".join([f'{start}"{expert}"{rest}{number}\n' for expert, number in zip(layer.experts, layer.numbers, strict=True)]).encode()


def _made_of(family: Metric, samples: Iterable[Sample]) -> Metric:
    made = Metric(family.name, family.documentation, family.type)
    made.samples = list(samples)
    return made


class _Families(Collector):
    """What an encoder takes for a registry."""

    def __init__(self, *families: Metric) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families
