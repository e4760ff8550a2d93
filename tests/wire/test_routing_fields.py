"""Slots and drops on the wire, and messages in which every field is set."""

from __future__ import annotations

import torch

from moeserve.api.output import DROP_REASONS, Drop, ForwardOutput
from moeserve.api.wire import (
    WireRequest,
    decode_forward_request,
    decode_forward_response,
    encode_forward_request,
    encode_forward_response,
)
from moeserve.v1 import moe_service_pb2 as pb

from .messages import REQUEST_TENSORS, RESPONSE_TENSORS, ROUTING_TENSORS, some_output


def test_a_message_with_everything_in_it_is_within_the_bounds() -> None:
    for num_tokens, hidden_size in ((1024, 64), (20_000, 8)):  # every other tensor just small enough to be sent inside, or none
        output = ForwardOutput(
            torch.zeros(num_tokens, hidden_size),
            **{name: torch.zeros(num_tokens, dtype=torch.int64) for name in ("requested", "processed", "dropped", "dropped_tokens")},
            **{name: torch.zeros(num_tokens, dtype=torch.int64) for name in ROUTING_TENSORS},
            aux_loss=1.0,
            z_loss=1.0,
        )
        answer = decode_forward_response(encode_forward_response("x" * 1000, output))
        assert isinstance(answer.result, ForwardOutput)
        assert all(len(getattr(answer.result, name)) == num_tokens for name in RESPONSE_TENSORS)
        tensors = {name: torch.zeros(num_tokens, dtype=torch.int64) for name in REQUEST_TENSORS[1:]}
        request = WireRequest(torch.zeros(num_tokens, hidden_size), "l" * 1000, **tensors, capacity_factor=1.0, noise="none", seed=1)
        decoded = decode_forward_request(encode_forward_request(request))
        assert all(len(getattr(decoded, name)) == num_tokens for name in REQUEST_TENSORS)


def test_every_reason_of_a_drop_has_a_name_and_a_new_one_is_still_a_drop() -> None:
    assert {number: f"DROP_REASON_{name.upper()}" for number, name in {0: "none", **DROP_REASONS}.items()} == {
        number: name for name, number in pb.DropReason.items()
    }
    output = ForwardOutput(
        *([torch.zeros(2)] * 5), 0.0, 0.0, torch.tensor([[4, 1], [3, 2]]), torch.ones(2, 2), drop_reasons=torch.tensor([[0, 1], [99, 0]])
    )
    assert output.drops == [Drop(0, 1, 1, "capacity"), Drop(1, 0, 3, "unknown")]


def test_an_answer_of_an_older_service_has_no_drops() -> None:
    message = pb.ForwardResponse.FromString(encode_forward_response("", some_output()))
    message.ClearField("slots")
    message.ClearField("drop_reasons")
    answer = decode_forward_response(message.SerializeToString()).result
    assert isinstance(answer, ForwardOutput)
    assert answer.topk_ids is not None
    assert (answer.slots, answer.drop_reasons, answer.drops) == (None, None, None)
