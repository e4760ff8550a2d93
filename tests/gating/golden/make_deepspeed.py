"""Writes deepspeed.npz: what DeepSpeed's own gates answer over a grid of small cases.

    DS_BUILD_OPS=0 pip install -e ".[golden]"     (in an environment of its own)
    python tests/gating/golden/make_deepspeed.py

Router logits are made again from the case's number by `deepspeed_cases.logits_of`, so only answers are kept: capacity, demand [E], kept
[T, E] as bits, weights of kept choices in the order of (token, expert), loss.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from deepspeed.moe.sharded_moe import top1gating, top2gating, topkgating

sys.path.insert(0, str(Path(__file__).parents[3]))
from tests.gating.golden.deepspeed_cases import GOLDEN, Case, all_cases, logits_of, used_token_of


def answer(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, combine weights [T, E, C], demand [E]) by the gate the case names."""
    logits, factor, least = logits_of(case), case.capacity_factor, case.min_capacity
    if case.gate == "top1":
        loss, combine, _, demand = top1gating(logits, factor, least, used_token_of(case), None, case.drop_tokens, use_rts=False)
    elif case.gate == "top2":
        loss, combine, _, demand = top2gating(logits, factor, least, case.drop_tokens, top2_2nd_expert_sampling=False)
    else:
        loss, combine, _, demand = topkgating(logits, case.top_k, factor, least, case.drop_tokens, drop_policy=case.drop_policy)
    return loss, combine, demand


def main() -> None:
    losses, capacities, demands, kept, weights = [], [], [], [], []
    for case in all_cases():
        loss, combine, demand = answer(case)
        losses.append(loss.item())
        capacities.append(combine.shape[2])
        demands.append(demand.numpy().astype(np.int16))
        dense = combine.sum(dim=2)
        is_kept = combine.bool().any(dim=2)
        kept.append(np.packbits(is_kept.numpy()))
        weights.append(dense[is_kept].numpy())
    np.savez_compressed(
        GOLDEN,
        losses=np.array(losses, dtype=np.float32),
        capacities=np.array(capacities, dtype=np.int16),
        demands=np.concatenate(demands),
        kept=np.concatenate(kept),
        weights=np.concatenate(weights),
    )
    print(f"{len(losses)} cases, {GOLDEN.stat().st_size} bytes")


if __name__ == "__main__":
    main()
