"""How a peer takes part in `bench_peers.py`: it names its sides, and runs one of them for a moment when it is its turn.

A peer runs in an environment of its own, so nothing here but torch is imported. T tokens, H hidden size.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping

import torch

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 512, 2048, 8, 2
#: [T, H] -> [T, H]
Side = Callable[[torch.Tensor], torch.Tensor]


def take_turns(sides: Mapping[str, Side], versions: str) -> None:
    """Until stdin ends. A line in: side, T, seconds; a line out: the seconds of each call. The first call of a turn warms up."""
    out, sys.stdout = sys.stdout, sys.stderr
    print(json.dumps({"sides": list(sides), "versions": versions}), file=out, flush=True)
    for line in sys.stdin:
        name, tokens, seconds = json.loads(line)
        hidden_states = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(tokens))
        with torch.no_grad():
            print(json.dumps(_turn(sides[name], hidden_states, seconds)), file=out, flush=True)


def _turn(side: Side, hidden_states: torch.Tensor, seconds: float) -> list[float]:
    answer = side(hidden_states)
    assert answer.shape == hidden_states.shape, answer.shape
    assert answer.isfinite().all()
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while not taken or time.perf_counter() < end:
        began = time.perf_counter()
        side(hidden_states)
        taken.append(time.perf_counter() - began)
    return taken


def top_k(gate: torch.nn.Linear, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts [T, K] and their weights [T, K], which sum to 1."""
    weights, experts = torch.softmax(gate(hidden_states), dim=-1).topk(TOP_K)
    return experts, weights / weights.sum(-1, keepdim=True)


def grouped(ask: Callable[[dict[int, torch.Tensor]], dict[int, torch.Tensor]], gate: torch.nn.Linear) -> Side:
    """What a caller of one expert at a time does by hand: the rows of each expert together, one call for each expert, all at once."""

    def side(hidden_states: torch.Tensor) -> torch.Tensor:
        experts, weights = top_k(gate, hidden_states)
        rows = {expert: (experts == expert).nonzero() for expert in experts.unique().tolist()}
        answers = ask({expert: hidden_states[where[:, 0]] for expert, where in rows.items()})
        output = torch.zeros_like(hidden_states)
        for expert, where in rows.items():
            output.index_add_(0, where[:, 0], answers[expert] * weights[where[:, 0], where[:, 1], None])
        return output

    return side
