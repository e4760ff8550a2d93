"""Counts of every expert, and how many of them Prometheus gets.

E experts of a layer.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import torch
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, Sample
from prometheus_client.registry import Collector

from moeserve.config import LayerSpec
from moeserve.observe.counted import COMPUTED, LayerCounted
from moeserve.observe.summary import balancedness

log = logging.getLogger(__name__)

ExpertDetail = Literal["off", "top", "full"]

#: with more series of experts, only the busiest experts have series, unless the configuration says "full"
MAX_DEFAULT_SERIES: Final = 10_000
_SERIES_PER_EXPERT: Final = 3
_TOP_EXPERTS: Final = 32


@dataclass(frozen=True)
class LayerSeries:
    """Some experts of a layer, and the number of each; the series of expert e has the label `expert="e"` beside `labels`."""

    labels: dict[str, str]
    experts: Sequence[int]
    numbers: Sequence[int]


class ExpertFamily(Metric):
    """A metric of experts, which may have tens of thousands of series: their samples are made only for a scrape."""

    def __init__(self, name: str, documentation: str, kind: Literal["counter", "gauge"], **labels: str) -> None:
        super().__init__(name, documentation, kind)
        self.series_name = f"{name}_total" if kind == "counter" else name
        self.layers: list[LayerSeries] = []
        self._labels = labels

    def add(self, layer: str, experts: Sequence[int], numbers: torch.Tensor, **labels: str) -> None:
        """numbers [E] int64: one per expert of the layer."""
        every = numbers.tolist()
        self.layers.append(LayerSeries({"layer": layer, **self._labels, **labels}, experts, [every[expert] for expert in experts]))

    @property
    def samples(self) -> list[Sample]:
        """A sample for each layer and shown expert."""
        return [
            Sample(self.series_name, {"expert": str(expert), **layer.labels}, number)
            for layer in self.layers
            for expert, number in zip(layer.experts, layer.numbers, strict=True)
        ]

    @samples.setter
    def samples(self, _none: list[Sample]) -> None:
        """The samples that Metric starts with: none."""


class ExpertCounts(Collector):
    """Tokens of every layer and expert since the start: one vector addition per batch, turned into series when scraped.

    `detail` says which experts have series of their own; None = all, or the busiest where all would be more than MAX_DEFAULT_SERIES.
    """

    def __init__(self, specs: Sequence[LayerSpec], detail: ExpertDetail | None) -> None:
        self._names = [spec.name for spec in specs]
        #: experts without weights are on no host, so they have no copies
        self._hosted = [spec.num_hosted_experts for spec in specs]
        self._detail = detail or _default_detail(specs)
        self.tokens = [0] * len(specs)
        self.processed = [torch.zeros(spec.num_experts, dtype=torch.int64) for spec in specs]
        #: by reason, per layer
        self.dropped_by_reason = [{"capacity": torch.zeros(spec.num_experts, dtype=torch.int64)} for spec in specs]
        #: [E] per layer: pairs that callers of other frontends asked for, who are counted here, too
        self._elsewhere = [torch.zeros(spec.num_experts, dtype=torch.int64) for spec in specs]
        #: [E] per layer: copies on reachable hosts
        self.live_copies = [torch.zeros(spec.num_experts, dtype=torch.int64) for spec in specs]

    def add(self, layer: int, tokens: int, processed: torch.Tensor, dropped: Mapping[str, torch.Tensor]) -> None:
        """`tokens` used tokens were answered; processed [E] and, for each reason, dropped [E] int64 (token, expert) pairs."""
        self.tokens[layer] += tokens
        self.processed[layer] += processed
        for reason, pairs in dropped.items():
            known = self.dropped_by_reason[layer]
            known[reason] = known[reason] + pairs if reason in known else pairs.clone()

    def counted(self) -> tuple[LayerCounted, ...]:
        """All counts of this frontend, for `add_elsewhere`."""
        return tuple(
            LayerCounted(tokens, {reason: pairs.numpy().tobytes() for reason, pairs in ({COMPUTED: processed} | dropped).items()})
            for tokens, processed, dropped in zip(self.tokens, self.processed, self.dropped_by_reason, strict=True)
        )

    def add_elsewhere(self, layers: Sequence[LayerCounted]) -> None:
        """Counts of a frontend elsewhere of the same layers, which are no demand of this one. Raises ValueError for other layers."""
        by_reason = [counted.by_reason() for counted in layers]
        shapes = [{pairs.shape for pairs in one.values()} for one in by_reason]
        if shapes != [{processed.shape} for processed in self.processed] or any(COMPUTED not in one for one in by_reason):
            raise ValueError("its layers have other experts")
        for layer, (counted, dropped) in enumerate(zip(layers, by_reason, strict=True)):
            self._elsewhere[layer] = self._elsewhere[layer] + sum(dropped.values())
            self.add(layer, counted.tokens, dropped.pop(COMPUTED), dropped)

    def dropped(self, layer: int) -> torch.Tensor:
        """[E] int64: (token, expert) pairs not computed, for whatever reason."""
        return torch.stack(list(self.dropped_by_reason[layer].values())).sum(dim=0)

    def requested(self) -> list[torch.Tensor]:
        """For each layer [E] int64, of the experts that live on hosts: (token, expert) pairs that callers asked this frontend for."""
        both = (processed + self.dropped(layer) - self._elsewhere[layer] for layer, processed in enumerate(self.processed))
        return [pairs[:hosted] for pairs, hosted in zip(both, self._hosted, strict=True)]

    def collect(self) -> Iterable[Metric]:
        """The families of a scrape, with the experts that `detail` shows."""
        tokens = CounterMetricFamily("moeserve_tokens", "Used tokens answered", labels=["layer"])
        processed = ExpertFamily("moeserve_expert_tokens", "Computed (token, expert) pairs", "counter")
        dropped = ExpertFamily("moeserve_expert_dropped_tokens", "(token, expert) pairs not computed", "counter")
        copies = ExpertFamily("moeserve_expert_copies", "Copies of an expert", "gauge", state="live")
        balance = GaugeMetricFamily("moeserve_expert_balancedness_ratio", "Mean / max of an expert's demand", labels=["layer"])
        for layer, name in enumerate(self._names):
            tokens.add_metric([name], self.tokens[layer])
            demand = self.processed[layer] + self.dropped(layer)
            shown = self._busiest(demand)
            processed.add(name, shown, self.processed[layer])
            for reason, pairs in list(self.dropped_by_reason[layer].items()):  # scraped by another thread than the one that counts
                dropped.add(name, shown, pairs, reason=reason)
            copies.add(name, self._shown_copies(layer, shown), self.live_copies[layer])
            balance.add_metric([name], balancedness(demand.tolist()))
        return [tokens, processed, dropped, copies, balance]

    def _busiest(self, demand: torch.Tensor) -> list[int]:
        if self._detail == "full":
            return list(range(len(demand)))
        count = min(_TOP_EXPERTS, len(demand)) if self._detail == "top" else 0
        return sorted(demand.topk(count).indices.tolist())

    def _shown_copies(self, layer: int, shown: Sequence[int]) -> list[int]:
        """With a limit, unavailable experts come first: an alert needs them."""
        hosted = self._hosted[layer]
        of_shown = [expert for expert in shown if expert < hosted]
        if self._detail != "top":
            return of_shown
        missing = (self.live_copies[layer][:hosted] == 0).nonzero().flatten().tolist()
        return sorted(list(dict.fromkeys((*missing, *of_shown)))[:_TOP_EXPERTS])


def _default_detail(specs: Sequence[LayerSpec]) -> ExpertDetail:
    series = _SERIES_PER_EXPERT * sum(spec.num_experts for spec in specs)
    if series <= MAX_DEFAULT_SERIES:
        return "full"
    log.warning(
        "the metrics show the %d busiest experts of each layer: series for all would be %d, more than %d "
        '(observability.expert_detail: "full" = all, "top" = the busiest and no warning)',
        _TOP_EXPERTS,
        series,
        MAX_DEFAULT_SERIES,
    )
    return "top"
