"""What the gate decided, for one request or for a batch of them. T tokens, E experts, K choices per token, R requests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from moeserve.api.output import DROP_REASONS, DROPPED_BY_CAPACITY, Drop, list_drops
from moeserve.gating.drop import slots
from moeserve.gating.segments import Segments
from moeserve.gating.weights import keep_total


@dataclass(frozen=True)
class Routing:
    """The routing of one request.

    topk_ids       [T, K]  int64, in the order they were chosen: by descending score, unless the routing has another; -1 where the
                           caller made no choice
    topk_weights   [T, K]  float32, 0 where not kept
    kept           [T, K]  bool, false where the choice was dropped or the token is unused
    dropped_tokens [T]     bool, used tokens that lost at least one choice, or that no expert chose
    slots          [T, K]  int64, the row of the choice among those its expert takes from the capacity group, -1 where not kept
    requested, processed, dropped  [E] int64: demand before drops, (token, expert) pairs kept, and their difference
    capacity       rows an expert may take from the request's capacity group, None = no limit
    used_tokens    how many of the tokens are used
    aux_loss, z_loss  telemetry
    """

    topk_ids: Tensor
    topk_weights: Tensor
    kept: Tensor
    dropped_tokens: Tensor
    requested: Tensor
    processed: Tensor
    dropped: Tensor
    capacity: int | None
    used_tokens: int
    aux_loss: float
    z_loss: float
    batch: BatchRouting
    tokens: slice

    @property
    def slots(self) -> Tensor:
        """[T, K] int64, -1 where not kept; made when first asked for."""
        return self.batch.slots[self.tokens]

    @property
    def drop_reasons(self) -> Tensor:
        """[T, K] int32: why the choice was dropped, 0 where it was not; the numbers of `moeserve.api.output.DROP_REASONS`."""
        given_up = None if self.batch.given_up is None else self.batch.given_up[self.tokens]
        reasons = (self.batch.chosen[self.tokens] & ~self.kept).int() * DROPPED_BY_CAPACITY
        return reasons if given_up is None else torch.where(given_up > 0, given_up, reasons)

    @property
    def is_partial(self) -> bool:
        """Whether choices were not computed that experts had room for."""
        return self.batch.given_up is not None and bool((self.batch.given_up[self.tokens] > 0).any())

    @property
    def dropped_by_reason(self) -> Mapping[str, Tensor]:
        """reason -> [E] int64, pairs not computed because of it; together they are `dropped`. No reason where nothing was dropped."""
        if self.processed is self.requested:
            return {}
        if self.batch.given_up is None:
            return {"capacity": self.dropped}
        reasons, experts = self.drop_reasons, len(self.dropped)
        return {name: self.topk_ids[reasons == number].bincount(minlength=experts) for number, name in DROP_REASONS.items()}

    @property
    def drops(self) -> list[Drop]:
        """Every choice that was dropped, token by token."""
        return list_drops(self.topk_ids, self.drop_reasons)

    def dense(self) -> Tensor:
        """[T, E] float32 combine weights, 0 where an expert was not chosen or the choice was dropped."""
        num_tokens, num_experts = self.topk_ids.shape[0], self.requested.shape[0]
        return self.topk_weights.new_zeros(num_tokens, num_experts).scatter_add(1, self.topk_ids.clamp(min=0), self.topk_weights)


@dataclass(frozen=True)
class BatchRouting:
    """The routing of R requests laid end to end: tensors over tokens as in Routing, counts [R, E], losses [R] float32.

    request_sizes in tokens; used_tokens [R], how many of them are used
    chosen  [T, K] bool, what was asked for: kept plus dropped
    measure computes the losses, when they are asked for: nobody waits for telemetry before the experts have their rows
    groups  the tokens by capacity group; is_choice_major: whether first choices have the first slots
    given_up [T, K] int32, why choices that experts had room for were not computed after all, 0 = they were; None = all were
    """

    request_sizes: tuple[int, ...]
    used_tokens: Sequence[int]
    topk_ids: Tensor
    topk_weights: Tensor
    chosen: Tensor
    kept: Tensor
    dropped_tokens: Tensor
    requested: Tensor
    processed: Tensor
    dropped: Tensor
    capacity: tuple[int | None, ...]
    measure: Callable[[BatchRouting], tuple[Tensor, Tensor]]
    groups: Segments
    is_choice_major: bool
    given_up: Tensor | None = None

    @cached_property
    def losses(self) -> tuple[Tensor, Tensor]:
        """aux_loss and z_loss, [R] float32 each."""
        return self.measure(self)

    @property
    def aux_loss(self) -> Tensor:
        """[R] float32."""
        return self.losses[0]

    @property
    def z_loss(self) -> Tensor:
        """[R] float32."""
        return self.losses[1]

    @cached_property
    def slots(self) -> Tensor:
        """[T, K] int64 of all requests; made when first asked for."""
        admitted = self.kept if self.given_up is None else self.kept | (self.given_up > 0)
        return slots(self.topk_ids, admitted, self.is_choice_major, self.groups).masked_fill(~self.kept, -1)

    def without(self, reasons: Tensor, *, keeps_total: bool) -> BatchRouting:
        """The same, but for choices that nobody computed, reasons [T, K] int32, 0 = computed or dropped before.

        keeps_total: the remaining choices of a token take over the weight of those that are missing.
        """
        is_missing = self.kept & (reasons > 0)
        kept = self.kept & ~is_missing
        weights = keep_total(self.topk_weights, kept) if keeps_total else self.topk_weights * kept
        tokens, choices = is_missing.nonzero(as_tuple=True)
        requests = torch.repeat_interleave(torch.arange(len(self.request_sizes)), torch.tensor(self.request_sizes))[tokens]
        ones = torch.ones_like(tokens)
        missing = torch.zeros_like(self.dropped).index_put_((requests, self.topk_ids[tokens, choices]), ones, accumulate=True)
        before = torch.zeros_like(reasons) if self.given_up is None else self.given_up
        return replace(
            self,
            topk_weights=weights,
            kept=kept,
            dropped_tokens=self.dropped_tokens | is_missing.any(dim=1),
            processed=self.processed - missing,
            dropped=self.dropped + missing,
            given_up=torch.where(is_missing, reasons, before),
            measure=lambda _: self.losses,
        )

    def request(self, index: int) -> Routing:
        """The part of request `index`; views, no copies."""
        start = sum(self.request_sizes[:index])
        tokens = slice(start, start + self.request_sizes[index])
        of_tokens = self.topk_ids, self.topk_weights, self.kept, self.dropped_tokens
        topk_ids, topk_weights, kept, dropped_tokens = of_tokens if len(self.request_sizes) == 1 else (each[tokens] for each in of_tokens)
        requested = self.requested[index]
        return Routing(
            topk_ids=topk_ids,
            topk_weights=topk_weights,
            kept=kept,
            dropped_tokens=dropped_tokens,
            requested=requested,
            processed=requested if self.processed is self.requested else self.processed[index],
            dropped=self.dropped[index],
            capacity=self.capacity[index],
            used_tokens=self.used_tokens[index],
            aux_loss=self.aux_loss.tolist()[index],
            z_loss=self.z_loss.tolist()[index],
            batch=self,
            tokens=tokens,
        )
