"""What a batch gives the hosts of one layer to do.

K choices of a token, E experts, M shards of each, U = E * M units, P physical experts, D hosts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moeserve.bench.costs import Costs
from moeserve.bench.trace import Rows
from moeserve.config import CopyChoice
from moeserve.placement import LayerPlacement, choose_copies
from moeserve.placement.layer import Integers


@dataclass(frozen=True, eq=False)
class Parts:
    """hosts, seconds: those with work, and how long each works; sent_rows: of all messages to them."""

    hosts: Integers
    seconds: Rows
    sent_rows: float


@dataclass(frozen=True, eq=False)
class LayerWork:
    """shares [E]: of the rows that are asked; costs: for the sizes of these experts; choice: placement.copy_choice."""

    placement: LayerPlacement
    shares: Rows
    top_k: int
    costs: Costs
    choice: CopyChoice

    def parts(self, tokens: int, backlog_s: Rows, drawn: np.random.Generator) -> Parts:
        """Of a batch; backlog_s [D]: what each host has to do still. Choices are drawn, and copies chosen as a frontend does."""
        layer, shards, costs = self.placement, self.placement.tensor_parallel, self.costs
        counts = np.minimum(drawn.multinomial(tokens * self.top_k, self.shares), tokens)
        units = np.repeat(np.arange(len(counts) * shards), np.repeat(counts, shards))
        outstanding = (backlog_s / max(costs.expert_s.slope, 1e-9)).astype(np.int64)
        is_live = np.ones(layer.num_hosts, dtype=bool)
        physical = choose_copies(units, layer, is_live, outstanding, self.choice)
        rows = np.bincount(physical, minlength=len(layer.unit_of_physical))
        used = np.flatnonzero(rows)
        seconds = costs.expert_s.at(rows[used].astype(np.float64)) / shards
        of_host = np.bincount(layer.host_of_physical[used], weights=seconds, minlength=layer.num_hosts)
        of_rows = np.bincount(layer.host_of_physical[used], weights=rows[used], minlength=layer.num_hosts)
        hosts = np.flatnonzero(of_rows)
        # A token that chooses several experts of a host travels there once.
        share = of_rows[hosts] / max(1, len(units))
        sent_rows = float((tokens * (1 - (1 - share) ** (self.top_k * shards))).sum())
        return Parts(hosts, np.asarray(costs.pass_s + of_host[hosts], dtype=np.float64), sent_rows)
