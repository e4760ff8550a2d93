"""Answering without choices that nobody computes.

T tokens of the batch, K choices per token, M requests, R rows and N pairs of a work, A tokens that are computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moeserve.api.output import DROP_NUMBERS
from moeserve.config import CopyChoice, ResilienceConfig
from moeserve.frontend.delivery import Delivery
from moeserve.frontend.parcel import Parcel, ParcelState
from moeserve.frontend.routed import Part, RoutedBatch
from moeserve.layer.dispatch import HostWork, experts_of, restrict


@dataclass(frozen=True)
class Missing:
    """choices [T, K] bool: what some parcels are about, of tokens that no later part answers."""

    routed: RoutedBatch
    choices: torch.Tensor

    def can_lack(self, k_min: int) -> torch.Tensor:
        """[M] bool: requests that miss some of them, and would keep `k_min` choices of every token, or all that a token has."""
        routing, batch = self.routed.routing, self.routed.batch
        is_touched, request = self.choices.any(dim=1), batch.request_of_token
        is_short = is_touched & ((routing.kept & ~self.choices).sum(dim=1) < min(k_min, routing.kept.shape[1]))
        touched, short = (torch.zeros(len(batch.sizes), dtype=torch.bool) for _ in range(2))
        touched[request[is_touched]], short[request[is_short]] = True, True
        return touched & ~short


def missing_choices(routed: RoutedBatch, parcels: Sequence[Parcel]) -> Missing:
    """Which choices the parcels are about."""
    ids = routed.routing.topk_ids
    choices = torch.zeros(ids.shape, dtype=torch.bool)
    for parcel in parcels:
        for work in parcel.works:
            experts = torch.from_numpy(experts_of(work, parcel.part.view.placement))
            rows = work.rows[work.row_index]
            counts = (experts >= 0) & ~parcel.part.moved[rows]
            tokens = parcel.part.of_batch(rows[counts])
            pair, choice = (ids[tokens] == experts[counts, None]).nonzero(as_tuple=True)
            choices[tokens[pair], choice] = True
    return Missing(routed, choices)


class GivingUp:
    """All that is given up of a batch at one moment."""

    def __init__(self, routed: RoutedBatch, rules: ResilienceConfig) -> None:
        self._routed = routed
        self._k_min, self._keeps_total = rules.k_min, rules.on_expert_failure == "renormalize"
        self._reasons: list[tuple[Parcel, int]] = []

    def add(self, parcel: Parcel, reason: str) -> None:
        """One more parcel that nobody waits for any longer, where its requests can be answered without it."""
        self._reasons.append((parcel, DROP_NUMBERS[reason]))

    def carry_out(self, delivery: Delivery, copy_choice: CopyChoice) -> list[Part]:
        """Changes the routing; returns parts of the tokens that lack choices now, to be computed again: their weights are others."""
        given_up = [(parcel, reason) for parcel, reason in self._reasons if delivery.is_owed(parcel)]  # others were answered meanwhile
        if not given_up:
            return []
        routed = self._routed
        missing = missing_choices(routed, [parcel for parcel, _ in given_up])
        is_answered = missing.can_lack(self._k_min)[routed.batch.request_of_token]
        reasons = torch.zeros(missing.choices.shape, dtype=torch.int32)
        for parcel, reason in given_up:
            reasons[missing_choices(routed, [parcel]).choices & is_answered[:, None]] = reason
            delivery.close(parcel, ParcelState.GIVEN_UP)
            for work in self._musts(parcel, is_answered):
                delivery.lose(parcel.part, work, parcel, is_must=True)
        parts = [self._anew(part, reasons, copy_choice) for part in dict.fromkeys(parcel.part for parcel, _ in given_up)]
        routed.lack(reasons, keeps_total=self._keeps_total)
        found = [part for part in parts if part is not None]
        routed.parts += found
        return found

    def _musts(self, parcel: Parcel, is_answered: torch.Tensor) -> list[HostWork]:
        """What of a parcel is of requests that cannot be answered without it."""
        found = (restrict(work, (~is_answered[parcel.part.of_batch(work.rows)]).numpy()) for work in parcel.works)
        return [work for work in found if work is not None]

    def _anew(self, part: Part, reasons: torch.Tensor, copy_choice: CopyChoice) -> Part | None:
        own = part.of_batch(torch.arange(len(part.hidden_states)))
        rows = ((reasons[own] > 0).any(dim=1) & ~part.moved).nonzero().squeeze(1)
        if not len(rows):
            return None
        view = part.view
        planned = view.head.plan_with_fewer(
            part.planned, rows, reasons[own[rows]] > 0, view.placement, view.loads(copy_choice), keeps_total=self._keeps_total
        )
        part.moved[rows] = True
        return Part(own[rows], part.hidden_states[rows], view, planned)
