"""Tokens of a batch that are sent together: the whole batch, or one of its micro-batches.

T tokens of the part, K choices per token, H hidden size, R rows of one message.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import torch

from moeserve.frontend.view import LayerView
from moeserve.layer.dispatch import HostWork, combine
from moeserve.layer.head import Planned
from moeserve.transport import Partial

# With fewer tokens a pass is bound by reading the experts' weights (benchmarks/RESULTS.md: at T = 256 a token costs a fifth to a half
# more than at 1024), and smaller micro-batches cost more than they hide of the frontend's work.
MIN_MICRO_BATCH_TOKENS = 512


class Answer(NamedTuple):
    """The answer to one message: rows [R] int64, partial [R, H] float32; `host` sent it."""

    host: int
    rows: torch.Tensor
    partial: torch.Tensor


class Sent(NamedTuple):
    """A message in flight."""

    works: tuple[HostWork, ...]
    rows: torch.Tensor
    future: asyncio.Future[Partial]


@dataclass(eq=False)
class Part:
    """`hidden_states` [T, H] are the rows of the batch from `start` on; the batch uses `view`; `planned` is their dispatch."""

    start: int
    hidden_states: torch.Tensor
    view: LayerView
    planned: Planned
    sent: list[Sent] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    lost: list[HostWork] = field(default_factory=list)
    total: torch.Tensor | None = None

    @property
    def num_elements(self) -> int:
        """How many numbers its rows have: T * H."""
        return self.hidden_states.numel()

    def combined(self) -> torch.Tensor:
        """[T, H] float32: the sum of all answers so far, in the order of the hosts."""
        if self.total is None or self.answers:
            answers = sorted(self.answers, key=lambda answer: answer.host)
            total = combine([(answer.rows, answer.partial) for answer in answers], *self.hidden_states.shape)
            self.total = total if self.total is None else self.total + total
            self.answers.clear()
        return self.total

    def give_up(self) -> None:
        """Cancels everything that has not been answered yet."""
        for sent in self.sent:
            sent.future.cancel()


def micro_batches(num_tokens: int, wanted: int) -> list[tuple[int, int]]:
    """Ranges of tokens: up to `wanted` of about the same size, none below MIN_MICRO_BATCH_TOKENS unless it is the only one."""
    count = max(1, min(wanted, num_tokens // MIN_MICRO_BATCH_TOKENS))
    return list(pairwise(num_tokens * index // count for index in range(count + 1)))
