"""MindFormers `TopkRouter`, first version: K rounds, and capacity is decided inside each round.

T tokens, E experts, K choices per token. p = softmax(x). In every round a token asks for the expert with the largest p it has not been
given yet; the expert takes it while it has room, tokens in order, after all it took in earlier rounds. Only an expert that took the
token is taken out of its p: a token that was turned away asks the same expert again, in vain. The weight of a round is p[e]; with
`renormalize = "post_drop"` and `renormalize_eps = 1e-9` they are normalised as MindFormers does.
"""

from __future__ import annotations

import torch

from moeserve.gating.drop import place_in_line
from moeserve.gating.gate_input import GateInput, Selection
from moeserve.gating.scoring import softmax
from moeserve.gating.selection import select_top_k


def mindformers(gate: GateInput) -> Selection:
    scores = softmax(gate.router_logits)
    left = scores.clone()  # -1 once an expert has the token, below every probability
    used = gate.requests.chosen(torch.zeros_like(scores[:, :1], dtype=torch.int64))
    groups, limit = gate.groups, gate.capacity
    room = None if limit is None else torch.tensor([*limit.room, 0], device=scores.device)
    taken = groups.ids.new_zeros(groups.num_cells + 1)
    ids, kept = [], []
    for _ in range(gate.gating.top_k):
        expert = select_top_k(left, 1)
        is_taken = used
        if room is not None:
            # Unused tokens wait in one more cell, which has room for none.
            cells = groups.cells(expert).masked_fill(~used.flatten(), groups.num_cells)
            place = place_in_line(cells, torch.arange(len(cells), device=cells.device), len(taken)) + taken[cells]
            is_taken = (place < room[cells // gate.num_experts])[:, None]
            taken = taken + torch.bincount(cells[is_taken.flatten()], minlength=len(taken))
        left = left.scatter(1, expert, left.gather(1, expert).masked_fill(is_taken, -1.0))
        ids.append(expert)
        kept.append(is_taken)
    topk_ids = torch.cat(ids, dim=1)
    return Selection(scores, topk_ids, scores.gather(1, topk_ids), kept=torch.cat(kept, dim=1))
