"""How works become messages: nothing is lost, nothing travels twice, and the answer is the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moeserve.frontend.patterns import PATTERNS, Message, hierarchical, point_to_point, ring
from moeserve.layer.dispatch import HostWork, plan
from moeserve.placement import LayerPlacement
from moeserve.transport import PassOn

HOSTS, EXPERTS = 4, 9
PLACEMENT = LayerPlacement(HOSTS, np.arange(EXPERTS), np.sort(np.arange(EXPERTS) % HOSTS))


def works(num_tokens: int, seed: int) -> list[HostWork]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(num_tokens, EXPERTS, generator=generator).topk(3).indices
    kept = torch.rand(num_tokens, 3, generator=generator) < 0.4
    return plan(ids, torch.rand(num_tokens, 3, generator=generator), kept, PLACEMENT).works


def triples(
    host: int, rows: torch.Tensor, row_index: torch.Tensor, local_experts: torch.Tensor, weights: torch.Tensor
) -> list[tuple[float, ...]]:
    """(host, token, slot, weight) of every pair."""
    return [(host, *pair) for pair in zip(rows[row_index.long()].tolist(), local_experts.tolist(), weights.tolist(), strict=True)]


def pairs_of(message: Message) -> list[tuple[float, ...]]:
    """What each destination is asked to compute, read from the message as the hosts read it."""
    found, start = [], 0
    ends = message.destinations or [(message.host, len(message.local_experts))]
    for host, end in ends:
        share = slice(start, end)
        assert (message.local_experts[share].diff() >= 0).all()
        found += triples(host, message.rows, message.row_index[share], message.local_experts[share], message.weights[share])
        start = end
    assert start == len(message.local_experts)
    return found


@pytest.mark.parametrize("pattern", PATTERNS)
@given(num_tokens=st.integers(0, 20), seed=st.integers(0, 1000), nodes=st.lists(st.sampled_from("ab"), min_size=HOSTS, max_size=HOSTS))
def test_every_pair_reaches_its_host_once_and_no_row_travels_twice(pattern: str, num_tokens: int, seed: int, nodes: list[str]) -> None:
    planned = works(num_tokens, seed)
    messages = PATTERNS[pattern](planned, dict(enumerate(nodes)))
    expected = [pair for work in planned for pair in triples(work.host, work.rows, work.row_index, work.local_experts, work.weights)]
    assert sorted(pair for message in messages for pair in pairs_of(message)) == sorted(expected)
    for message in messages:
        assert (message.rows.diff() > 0).all() and message.row_index.unique().tolist() == list(range(len(message.rows)))
        assert (message.pass_on is PassOn.NOTHING) == (len(message.works) == 1) == (not message.destinations)
        assert message.host == min(work.host for work in message.works)


def test_how_many_messages_there_are() -> None:
    planned = works(20, 0)
    assert len(planned) == HOSTS
    local_experts = {(work.host, slot) for work in planned for slot in work.local_experts.tolist()}
    assert len(point_to_point(planned, [])) == len(local_experts) == EXPERTS
    first, second = hierarchical(planned, ["a", "b", "a", "b"])
    assert [destination.host for destination in first.destinations] == [0, 2] and first.pass_on is PassOn.FAN_OUT
    assert [destination.host for destination in second.destinations] == [1, 3]
    (only,) = ring(planned, [])
    assert [destination.host for destination in only.destinations] == [0, 1, 2, 3] and only.pass_on is PassOn.CHAIN
    assert len(only.rows) < sum(len(work.rows) for work in planned), "rows several hosts need travel once"
