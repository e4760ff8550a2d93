"""Names of fields that carry tensors, an answer with all of them, and bytes of messages made by hand."""

from __future__ import annotations

import torch

from moeserve.api.output import ForwardOutput

REQUEST_TENSORS = ("hidden_states", "used_token", "topk_ids", "topk_weights", "token_ids")

OVERRIDES = ("capacity_factor", "noise", "seed")

ROUTING_TENSORS = ("topk_ids", "topk_weights", "slots", "drop_reasons")

RESPONSE_TENSORS = ("hidden_states", "requested", "processed", "dropped", "dropped_tokens", *ROUTING_TENSORS)


def some_output(num_tokens: int = 3, routing: bool = True, dtype: torch.dtype = torch.bfloat16) -> ForwardOutput:
    counts = torch.arange(8)
    return ForwardOutput(
        hidden_states=torch.randn(num_tokens, 64).to(dtype),
        requested=counts + 1,
        processed=counts,
        dropped=torch.ones_like(counts),
        dropped_tokens=torch.rand(num_tokens) > 0.5,
        aux_loss=1.25,
        z_loss=0.5,
        topk_ids=torch.randint(0, 8, (num_tokens, 2)) if routing else None,
        topk_weights=torch.rand(num_tokens, 2) if routing else None,
        slots=torch.randint(-1, 9, (num_tokens, 2)) if routing else None,
        drop_reasons=torch.randint(0, 2, (num_tokens, 2), dtype=torch.int32) if routing else None,
    )


def varint(value: int) -> bytes:
    return bytes([value]) if value < 0x80 else bytes([value & 0x7F | 0x80]) + varint(value >> 7)


def nested(number: int, body: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(body)) + body
