"""The answer to one token batch: the same type from a client and from a layer in this process.

T tokens, H hidden size, E experts, K choices per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, NamedTuple

import torch

DropReason = Literal["capacity", "host_lost", "late", "unknown"]

#: numbers of the protobuf enum `moeserve.v1.DropReason`, 0 = not dropped; a newer service may know more of them
DROPPED_BY_CAPACITY: Final = 1
DROP_REASONS: Final[Mapping[int, DropReason]] = {DROPPED_BY_CAPACITY: "capacity", 2: "host_lost", 3: "late"}
DROP_NUMBERS: Final[Mapping[str, int]] = {reason: number for number, reason in DROP_REASONS.items()}


class Drop(NamedTuple):
    """One choice that is not computed: a used token, its k-th choice, the expert, and why."""

    token: int
    choice: int
    expert: int
    reason: DropReason


@dataclass(frozen=True)
class ForwardOutput:
    """The experts' output for a token batch, and the fate of every choice.

    hidden_states  [T, H]  dtype of the input; zeros for a token none of whose choices was computed
    requested      [E]     int64, demand before drops
    processed      [E]     int64, (token, expert) pairs computed
    dropped        [E]     int64, requested - processed
    dropped_tokens [T]     bool, at least one choice of this token was not computed
    aux_loss, z_loss       telemetry of the gate; 0 when the caller routed
    topk_ids       [T, K]  int64, and topk_weights [T, K] float32 (0 where dropped): only on request; ids that a caller chose are -1 for no
                           choice and for unused tokens
    slots          [T, K]  int64, the row of the choice among those its expert takes from the capacity group, -1 where not computed;
                           only when asked for
    drop_reasons   [T, K]  int32, 0 where not dropped, else a key of DROP_REASONS; only when asked for
    model_revision         1 = the weights the layer was deployed with, one more for every swap since; one for the whole answer
    """

    hidden_states: torch.Tensor
    requested: torch.Tensor
    processed: torch.Tensor
    dropped: torch.Tensor
    dropped_tokens: torch.Tensor
    aux_loss: float
    z_loss: float
    topk_ids: torch.Tensor | None = None
    topk_weights: torch.Tensor | None = None
    slots: torch.Tensor | None = None
    drop_reasons: torch.Tensor | None = None
    model_revision: int = 1

    def to(self, device: torch.device) -> ForwardOutput:
        """The same with its tensors there, which are in one place."""
        if self.hidden_states.device == device:
            return self
        moved: dict[str, Any] = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **moved)

    @property
    def drops(self) -> list[Drop] | None:
        """Every choice that was dropped, token by token; None unless the request asked for the routing."""
        if self.topk_ids is None or self.drop_reasons is None:
            return None
        return list_drops(self.topk_ids, self.drop_reasons)


def list_drops(topk_ids: torch.Tensor, drop_reasons: torch.Tensor) -> list[Drop]:
    """[T, K] int64 and [T, K] int32, 0 = not dropped -> the dropped choices, token by token."""
    where = drop_reasons.nonzero(as_tuple=True)
    columns = (*where, topk_ids[where], drop_reasons[where])
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [Drop(token, choice, expert, DROP_REASONS.get(reason, "unknown")) for token, choice, expert, reason in rows]
