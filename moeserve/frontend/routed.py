"""A batch that was routed: what its gate chose, and its tokens in parts that travel together.

T tokens of the batch, P tokens of a part, K choices per token, H hidden size, R rows of one message.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import torch

from moeserve.api.tensors import is_finite
from moeserve.errors import MoEServeError
from moeserve.frontend.batch import Batch
from moeserve.frontend.parcel import Answer, Parcel
from moeserve.frontend.view import LayerView
from moeserve.gating import BatchRouting, Routing
from moeserve.layer.dispatch import combine
from moeserve.layer.head import Planned

# With fewer tokens a pass is bound by reading the experts' weights (benchmarks/RESULTS.md: at T = 256 a token costs a fifth to a half
# more than at 1024), and smaller micro-batches cost more than they hide of the frontend's work.
MIN_MICRO_BATCH_TOKENS = 512


@dataclass(eq=False)
class Part:
    """Tokens that travel together: a whole batch, one of its micro-batches, or those that are computed again with fewer choices.

    tokens         [P] int64, ascending, or a range: which of the batch they are
    hidden_states  [P, H]
    view           what the batch sees of its layer
    planned        which experts they need
    """

    tokens: slice | torch.Tensor
    hidden_states: torch.Tensor
    view: LayerView
    planned: Planned
    total: torch.Tensor | None = None

    @property
    def num_elements(self) -> int:
        """How many numbers its rows have: P * H."""
        return self.hidden_states.numel()

    @cached_property
    def moved(self) -> torch.Tensor:
        """[P] bool: tokens that a later part answers."""
        return torch.zeros(len(self.hidden_states), dtype=torch.bool)

    def of_batch(self, rows: torch.Tensor) -> torch.Tensor:
        """rows [R] int64 of this part -> [R] int64, which tokens of the batch they are."""
        return rows + self.tokens.start if isinstance(self.tokens, slice) else self.tokens[rows]

    def add(self, answers: Sequence[Answer]) -> list[Answer]:
        """Adds up what has come, in the order of the hosts; returns what is left out, because it is NaN or Inf and not final."""
        answers = sorted(answers, key=lambda answer: answer.host)
        total = self._sum(answers)
        bad = [] if is_finite(total) else [answer for answer in answers if not answer.is_final and not is_finite(answer.partial)]
        if bad:
            total = self._sum([answer for answer in answers if all(answer is not other for other in bad)])
        self.total = total if self.total is None else self.total + total
        return bad

    def so_far(self) -> torch.Tensor:
        """[P, H] float32: the sum of all answers that were added."""
        return torch.zeros(self.hidden_states.shape, dtype=torch.float32) if self.total is None else self.total

    def _sum(self, answers: Sequence[Answer]) -> torch.Tensor:
        return combine([(answer.rows, answer.partial) for answer in answers], *self.hidden_states.shape)


@dataclass(eq=False)
class RoutedBatch:
    """What is known of a batch from its gate to its answers: one view, one routing, and parts, the later of which replace the earlier."""

    batch: Batch
    view: LayerView
    routing: BatchRouting
    parts: list[Part]
    _requests: list[Routing] = field(default_factory=list)

    def requests(self) -> list[Routing]:
        """Of each request, its routing with its counts and losses; worked out once."""
        if not self._requests:
            self._requests = [self.routing.request(index) for index in range(len(self.batch.sizes))]
        return self._requests

    def lack(self, reasons: torch.Tensor, *, keeps_total: bool) -> None:
        """Choices that nobody computed, reasons [T, K] int32, 0 = somebody did; the others of their tokens may keep the total weight."""
        self.routing, self._requests = self.routing.without(reasons, keeps_total=keeps_total), []

    def finished(self) -> torch.Tensor:
        """[T, H] float32: what all parts have come to, and what needs no host; zeros where hosts still owe."""
        head = self.view.head
        travelled, again = ([part for part in self.parts if isinstance(part.tokens, slice) is first] for first in (True, False))
        totals = [head.finish(part.so_far(), part.hidden_states, part.planned) for part in travelled]
        total = totals[0] if len(totals) == 1 else torch.cat(totals)
        for part in again:
            total[part.tokens] = head.finish(part.so_far(), part.hidden_states, part.planned)
        return total

    def members(self, parcels: Iterable[Parcel]) -> list[int]:
        """Positions of the requests that need these parcels, as far as no later part has taken their place."""
        needed = {int(index) for parcel in parcels for index in self.batch.request_of_token[self._tokens(parcel)].unique()}
        return sorted(needed)

    def waiting(self, parcel: Parcel) -> bool:
        """Whether anybody who needs it still waits."""
        return any(not self.batch.members[index].answer.done() for index in self.members([parcel]))

    def wait_for(self, parcel: Parcel, sentence: str) -> None:
        """Those who need it are told so at their deadline."""
        for index in self.members([parcel]):
            self.batch.members[index].waits_for(sentence)

    def fail(self, parcel: Parcel, error: MoEServeError) -> None:
        """Those who need it get the error."""
        for index in self.members([parcel]):
            if not self.batch.members[index].answer.done():
                self.batch.members[index].answer.set_exception(error)

    def _tokens(self, parcel: Parcel) -> torch.Tensor:
        rows = torch.cat([work.rows for work in parcel.works])
        return parcel.part.of_batch(rows[~parcel.part.moved[rows]])


def micro_batches(start: int, end: int, wanted: int) -> list[tuple[int, int]]:
    """Ranges of the tokens `start` to `end`: up to `wanted` of about the same size, none below MIN_MICRO_BATCH_TOKENS but a single one."""
    num_tokens = end - start
    count = max(1, min(wanted, num_tokens // MIN_MICRO_BATCH_TOKENS))
    return list(pairwise(start + num_tokens * index // count for index in range(count + 1)))
