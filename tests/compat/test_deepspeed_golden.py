"""Whole-layer answers equal those recorded from DeepSpeed 0.19.8 by golden/make.py."""

from __future__ import annotations

import itertools

import pytest
import torch
from safetensors.torch import load_file

from moeserve.compat.deepspeed import MoE
from tests.support.closeness import assert_close

from .golden.cases import EXPERTS, GOLDEN, HIDDEN, all_cases, expert, fill, hidden_states

RECORDED = load_file(GOLDEN)
CASES = [(index, case) for index, case in enumerate(all_cases()) if f"{index}.output" in RECORDED]


def test_enough_is_recorded() -> None:
    assert len(CASES) >= 44
    kinds = {(case["k"], case["use_residual"], case["drop_tokens"]) for _, case in CASES}
    assert kinds == set(itertools.product((1, 2, 3), (True, False), (True, False)))


def layer_of(index: int, case: dict[str, object]) -> MoE:
    layer = MoE(HIDDEN, expert(), **case).eval()  # type: ignore[arg-type]
    fill(layer, index)
    return layer


@pytest.mark.parametrize(("index", "case"), CASES)
@torch.no_grad()
def test_the_layer_answers_as_recorded(index: int, case: dict[str, object]) -> None:
    x, expected = hidden_states(index), RECORDED[f"{index}.output"].view(-1, HIDDEN)
    output, l_aux, exp_counts = layer_of(index, case)(x)
    assert_close(l_aux, RECORDED[f"{index}.l_aux"], summed=HIDDEN + EXPERTS + len(expected))
    assert exp_counts.tolist() == RECORDED[f"{index}.exp_counts"].tolist()
    if case["k"] == 1 and case["drop_tokens"]:
        check_as_many_are_kept(index, case, output.view(-1, HIDDEN), expected)
    else:
        assert_close(output.view(-1, HIDDEN), expected)


def check_as_many_are_kept(index: int, case: dict[str, object], output: torch.Tensor, expected: torch.Tensor) -> None:
    """Every token is answered as if it were kept or as if it were dropped, and each expert keeps as many here and there."""
    layer, x = layer_of(index, {**case, "drop_tokens": False}), hidden_states(index).view(-1, HIDDEN)
    if_kept = layer(x)[0]
    if_dropped = layer.mlp(x) * layer.coefficient(x).softmax(1)[:, 1:] if case["use_residual"] else torch.zeros_like(x)
    wanted = layer.deepspeed_moe.gate.wg(x).argmax(1)
    kept = {}
    for who, answer in (("here", output), ("there", expected)):
        is_kept = (answer - if_kept).norm(dim=1) < (answer - if_dropped).norm(dim=1)
        assert_close(answer, torch.where(is_kept[:, None], if_kept, if_dropped))
        kept[who] = wanted[is_kept].bincount(minlength=EXPERTS).tolist()
    assert kept["here"] == kept["there"]
