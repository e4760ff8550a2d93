"""From the times that requests of several sizes took to the costs that explain them.

T tokens of a request, K choices of a token, E experts of a layer, D hosts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from moeserve.bench.costs import Costs
from moeserve.bench.curve import growing

_DRAWS: Final = 200
#: of the spread
_VALUES: Final = 100
#: rows of an expert that differ by less cannot be told apart
_STEP: Final = 1.2
_STAGES: Final = ("queue", "route", "dispatch", "experts", "combine")

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Measurement:
    """Requests of T tokens, the same ones in each round: seconds of each request, and the mean of each stage of the frontend."""

    tokens: int
    latencies_s: list[list[float]] = field(default_factory=list)
    stages_s: dict[str, list[float]] = field(default_factory=dict)

    def stage_s(self, name: str) -> float:
        """The median over the rounds."""
        return float(np.median(self.stages_s.get(name, [0.0])))

    @property
    def call_s(self) -> float:
        """Outside of the stages: the median over the rounds."""
        inside = np.sum([self.stages_s.get(name, [0.0] * len(self.latencies_s)) for name in _STAGES], axis=0)
        return float(np.median(np.mean(self.latencies_s, axis=1) - inside))

    @property
    def spread(self) -> Floats:
        """Of each request, what it took in each round, divided by its mean."""
        seconds = np.array(self.latencies_s)
        return np.asarray(seconds / seconds.mean(axis=0)).ravel()


@dataclass(frozen=True, eq=False)
class RequestWork:
    """What a request gives the hosts to do: host_of [E], its first copy's; shares [E] of the rows that are asked."""

    host_of: npt.NDArray[np.int64]
    shares: Floats
    top_k: int

    @classmethod
    def of(cls, placed: Sequence[tuple[int, Sequence[int]]], asked: Sequence[int], top_k: int) -> RequestWork:
        """Of hosts with their experts, and the rows of each expert. Those that do not compute have no host, and cost nothing."""
        host_of = np.full(len(asked), -1)
        for host, experts in placed:
            host_of[[expert for expert in experts if host_of[expert] < 0]] = host
        rows = np.array(asked, dtype=np.float64)
        return cls(host_of, rows / rows.sum(), top_k)

    def expected(self, tokens: int) -> Floats:
        """[4]: messages, rows that are sent; experts and their rows on the host with most of these. As drawn, on average."""
        drawn, seen = np.random.default_rng(0), []
        for counts in drawn.multinomial(tokens * self.top_k, self.shares, size=_DRAWS):
            counts = np.where(self.host_of < 0, 0, np.minimum(counts, tokens))  # noqa: PLW2901 - a token asks an expert once
            rows = np.bincount(np.maximum(self.host_of, 0), weights=counts)
            held = np.bincount(np.maximum(self.host_of, 0), weights=counts > 0)
            sent = tokens * (1 - (1 - rows / (tokens * self.top_k)) ** self.top_k)
            busiest = int(rows.argmax())
            seen.append((np.count_nonzero(rows), sent.sum(), held[busiest], rows[busiest]))
        return np.array(np.mean(seen, axis=0))


def fitted(sizes: tuple[int, int], found: Sequence[Measurement], work: RequestWork) -> Costs:
    """Curves through what was measured, and the other costs with the least relative errors; none below 0. sizes: H and I of the experts."""
    one, tokens = np.ones(len(found)), [each.tokens for each in found]
    messages, sent, experts, rows = np.array([work.expected(each.tokens) for each in found]).T

    def stage(name: str, *columns: Floats) -> list[float]:
        return _least_squares(np.stack(columns, axis=1), np.array([each.stage_s(name) for each in found]))

    hop_s, sent_row_s = stage("dispatch", messages, sent)
    pass_s = stage("experts", one, experts, rows)[0]
    combine_s, summed_row_s = stage("combine", one, sent)
    queue_s = stage("queue", one)[0] + combine_s
    of_experts = [max(0.0, each.stage_s("experts") - pass_s) for each in found]
    call_s = growing(tokens, [max(0.0, each.call_s) for each in found])
    batch_s = growing(tokens, [each.stage_s("route") + queue_s for each in found])
    expert_s = growing(rows / experts, of_experts / experts, _STEP)
    spread = np.quantile(np.concatenate([each.spread for each in found]), (np.arange(_VALUES) + 0.5) / _VALUES)
    values = tuple((spread / spread.mean()).tolist())
    return Costs(*sizes, call_s, batch_s, hop_s, sent_row_s, summed_row_s, pass_s, expert_s, values)


def _least_squares(columns: Floats, seconds: Floats) -> list[float]:
    """Factors of the columns, none below 0: those that would be are left out, the least first."""
    seconds = np.maximum(seconds, 1e-9)
    used = list(range(columns.shape[1]))
    while used:
        factors = np.linalg.lstsq(columns[:, used] / seconds[:, None], np.ones(len(seconds)), rcond=None)[0]
        if factors.min() >= 0:
            break
        del used[int(factors.argmin())]
    found = np.zeros(columns.shape[1])
    if used:
        found[used] = factors
    return [float(each) for each in found]
