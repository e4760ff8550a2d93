"""What the gate decided, for one request or for a batch of them. T tokens, E experts, K choices per token, R requests."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """The routing of one request.

    topk_ids       [T, K]  int64, by descending score
    topk_weights   [T, K]  float32, 0 where not kept
    kept           [T, K]  bool, false where the choice was dropped or the token is unused
    dropped_tokens [T]     bool, used tokens that lost at least one choice
    requested, processed, dropped  [E] int64: demand before drops, (token, expert) pairs kept, and their difference
    capacity       rows an expert may take from the request's capacity group, None = no limit
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
    aux_loss: float
    z_loss: float

    def dense(self) -> Tensor:
        """[T, E] float32 combine weights, 0 where an expert was not chosen or the choice was dropped."""
        num_tokens, num_experts = self.topk_ids.shape[0], self.requested.shape[0]
        return self.topk_weights.new_zeros(num_tokens, num_experts).scatter(1, self.topk_ids, self.topk_weights)


@dataclass(frozen=True)
class BatchRouting:
    """The routing of R requests laid end to end: tensors over tokens as in Routing, counts [R, E], losses [R] float32.

    request_sizes in tokens; used_tokens [R] int64, how many of them are used
    """

    request_sizes: tuple[int, ...]
    used_tokens: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    kept: Tensor
    dropped_tokens: Tensor
    requested: Tensor
    processed: Tensor
    dropped: Tensor
    capacity: tuple[int | None, ...]
    aux_loss: Tensor
    z_loss: Tensor

    def request(self, index: int) -> Routing:
        """The part of request `index`; views, no copies."""
        start = sum(self.request_sizes[:index])
        tokens = slice(start, start + self.request_sizes[index])
        return Routing(
            topk_ids=self.topk_ids[tokens],
            topk_weights=self.topk_weights[tokens],
            kept=self.kept[tokens],
            dropped_tokens=self.dropped_tokens[tokens],
            requested=self.requested[index],
            processed=self.processed[index],
            dropped=self.dropped[index],
            capacity=self.capacity[index],
            aux_loss=self.aux_loss[index].item(),
            z_loss=self.z_loss[index].item(),
        )
