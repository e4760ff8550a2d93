"""Whole-layer answers equal those recorded from DeepSpeed 0.19.8 by golden/make.py."""

from __future__ import annotations

import itertools

import pytest
import torch
from safetensors.torch import load_file

from moeserve.compat.deepspeed import MoE

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
    torch.testing.assert_close(l_aux, RECORDED[f"{index}.l_aux"], atol=2e-5, rtol=0)
    assert exp_counts.tolist() == RECORDED[f"{index}.exp_counts"].tolist()
    if case["k"] == 1 and case["drop_tokens"]:
        check_as_many_are_kept(index, case, output.view(-1, HIDDEN), expected)
    else:
        torch.testing.assert_close(output.view(-1, HIDDEN), expected, atol=3e-6, rtol=1e-5)


def check_as_many_are_kept(index: int, case: dict[str, object], output: torch.Tensor, expected: torch.Tensor) -> None:
    """Every token is answered as if it were kept or as if it were dropped, and each expert keeps as many here and there."""
    layer, x = layer_of(index, {**case, "drop_tokens": False}), hidden_states(index).view(-1, HIDDEN)
    if_kept = layer(x)[0]
    if_dropped = layer.mlp(x) * layer.coefficient(x).softmax(1)[:, 1:] if case["use_residual"] else torch.zeros_like(x)
    wanted = layer.deepspeed_moe.gate.wg(x).argmax(1)
    kept = {}
    for who, answer in (("here", output), ("there", expected)):
        is_kept = torch.isclose(answer, if_kept, atol=3e-6, rtol=1e-5).all(1)
        torch.testing.assert_close(answer[~is_kept], if_dropped[~is_kept], atol=3e-6, rtol=1e-5)
        kept[who] = wanted[is_kept].bincount(minlength=EXPERTS).tolist()
    assert kept["here"] == kept["there"]
