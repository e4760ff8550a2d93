"""The answer to one token batch: the same type from a client and from a layer in this process.

T tokens, H hidden size, E experts, K choices per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ForwardOutput:
    """What the experts made of a token batch, and what became of every choice.

    hidden_states  [T, H]  dtype of the input; zeros for a token none of whose choices was computed
    requested      [E]     int64, demand before drops
    processed      [E]     int64, (token, expert) pairs computed
    dropped        [E]     int64, requested - processed
    dropped_tokens [T]     bool, at least one choice of this token was not computed
    aux_loss, z_loss       telemetry of the gate; 0 when the caller routed
    topk_ids       [T, K]  int64, and topk_weights [T, K] float32 (0 where dropped): only when asked for
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
