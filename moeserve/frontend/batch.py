"""Requests that run together.

T tokens of all requests, H hidden size, K choices per token.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from moeserve.api.call_trace import mark_all
from moeserve.api.output import ForwardOutput
from moeserve.api.request import LayerRequest
from moeserve.config import GatingOverrides
from moeserve.errors import ExpertUnavailable
from moeserve.frontend import timing
from moeserve.frontend.callers import Caller
from moeserve.frontend.places import BatchPlace
from moeserve.frontend.turns import Turns


@dataclass(eq=False)
class Admitted:
    """One admitted request and the future its caller waits for; `deadline` is a monotonic time in seconds.

    `is_held`: it counts among the tokens that were admitted. `waiting` and `order` are those of `Queued`.
    """

    request: LayerRequest
    caller: Caller
    deadline: float
    answer: asyncio.Future[ForwardOutput]
    admitted_at: float = field(default_factory=time.monotonic)
    is_held: bool = True
    waiting: int = 0
    order: tuple[float, int] = (0.0, 0)
    #: of a request that is cut
    turns: Turns | None = None
    _last_words: str = ""

    def waits_for(self, sentence: str) -> None:
        """Unless it is answered before, the caller is told what was waited for last, just in time for its deadline."""
        if not self._last_words:
            margin_s = min(timing.LAST_WORD_S, (self.deadline - time.monotonic()) / 10)
            timer = self.answer.get_loop().call_at(self.deadline - margin_s, self._say)
            self.answer.add_done_callback(lambda _: timer.cancel())  # which would keep the request until then
        self._last_words = sentence

    def _say(self) -> None:
        if not self.answer.done():
            self.answer.set_exception(ExpertUnavailable(self._last_words))

    @property
    def tokens(self) -> int:
        """How many tokens it has."""
        return self.request.num_tokens

    @property
    def join_key(self) -> tuple[int, bool, GatingOverrides]:
        """Only requests with the same key can run together.

        The key: routed by the gate (0) or by callers (their K); with token ids or not; the gating.
        """
        top_k = 0 if self.request.topk_ids is None else self.request.topk_ids.shape[1]
        return top_k, self.request.token_ids is not None, self.request.overrides


class Batch:
    """At least one request; tensors are joined on first use. A single request is never copied."""

    def __init__(self, members: Sequence[Admitted], place: BatchPlace | None = None) -> None:
        self.members = members
        #: with the hosts, where there are few
        self.place = place
        self.sizes = [member.request.num_tokens for member in members]
        self.deadline = max(member.deadline for member in members)
        #: of those who want to know where the time goes
        self.traces = [member.request.trace for member in members if member.request.trace is not None]

    def mark(self, stage: str) -> None:
        """As `CallTrace.mark`."""
        mark_all(self.traces, stage)

    def begin(self, now: float) -> None:
        """Tells the requests that want to know."""
        begun = [member.request.begun for member in self.members if member.request.begun is not None]
        for each in begun:
            each.at_s, each.is_first = now, each is begun[0]

    @cached_property
    def hidden_states(self) -> torch.Tensor:
        """[T, H]: the members' dtype, float32 where they differ."""
        parts = [member.request.hidden_states for member in self.members]
        if len({part.dtype for part in parts}) > 1:
            parts = [part.float() for part in parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @cached_property
    def used_token(self) -> torch.Tensor | None:
        """[T] bool; None when every token is used."""
        masks = [member.request.used_token for member in self.members]
        if all(mask is None for mask in masks):
            return None
        return torch.cat(
            [torch.ones(size, dtype=torch.bool) if mask is None else mask for mask, size in zip(masks, self.sizes, strict=True)]
        )

    @cached_property
    def topk_ids(self) -> torch.Tensor | None:
        """[T, K] int64 when the callers routed."""
        parts = [member.request.topk_ids.long() for member in self.members if member.request.topk_ids is not None]
        return torch.cat(parts) if parts else None

    @cached_property
    def topk_weights(self) -> torch.Tensor | None:
        """[T, K] float32 when the callers routed."""
        parts = [member.request.topk_weights.float() for member in self.members if member.request.topk_weights is not None]
        return torch.cat(parts) if parts else None

    @cached_property
    def token_ids(self) -> torch.Tensor | None:
        """[T] int64 when the callers sent them."""
        parts = [member.request.token_ids.long() for member in self.members if member.request.token_ids is not None]
        return torch.cat(parts) if parts else None

    @property
    def overrides(self) -> GatingOverrides:
        """The changes of all members to the layer's gating."""
        return self.members[0].request.overrides

    def rest(self) -> None:
        """As `BatchPlace.rest`."""
        if self.place is not None:
            self.place.rest()

    async def go_on(self) -> None:
        """As `BatchPlace.go_on`."""
        if self.place is not None:
            await self.place.go_on()

    async def turn(self, start: int) -> int:
        """Waits until the tokens from `start` on may run; returns up to where: T unless it is one request that is cut."""
        turns = self.members[0].turns
        return self.num_tokens if turns is None else await turns.end_of(start)

    def end_turn(self, start: int) -> None:
        """The tokens of the turn from `start` on were computed."""
        if (turns := self.members[0].turns) is not None:
            turns.computed(start)

    @property
    def num_tokens(self) -> int:
        """How many tokens all requests have: T."""
        return sum(self.sizes)

    @cached_property
    def request_of_token(self) -> torch.Tensor:
        """[T] int64: which member each token is of."""
        return torch.repeat_interleave(torch.arange(len(self.sizes)), torch.tensor(self.sizes))

    @property
    def unanswered(self) -> list[Admitted]:
        """Those who still wait."""
        return [member for member in self.members if not member.answer.done()]

    @property
    def is_abandoned(self) -> bool:
        """Whether no caller waits for an answer any more."""
        return all(member.answer.done() for member in self.members)

    def fail(self, error: Exception) -> None:
        """Everybody who still waits gets `error`."""
        for member in self.unanswered:
            member.answer.set_exception(error)
