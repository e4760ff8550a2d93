"""Whole-layer answers equal those recorded from DeepSpeed 0.19.8 by golden/make.py."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from moeserve.compat.deepspeed import MoE

from .golden.cases import GOLDEN, HIDDEN, all_cases, expert, fill, hidden_states

RECORDED = load_file(GOLDEN)
CASES = [(index, case) for index, case in enumerate(all_cases()) if f"{index}.output" in RECORDED]


def test_enough_is_recorded() -> None:
    assert len(CASES) >= 36
    assert {(case["k"], case["use_residual"]) for _, case in CASES} == {(k, residual) for k in (1, 2, 3) for residual in (True, False)}


@pytest.mark.parametrize(("index", "case"), CASES)
@torch.no_grad()
def test_the_layer_answers_as_recorded(index: int, case: dict[str, object]) -> None:
    layer = MoE(HIDDEN, expert(), **case).eval()  # type: ignore[arg-type]
    fill(layer, index)
    output, l_aux, exp_counts = layer(hidden_states(index))
    torch.testing.assert_close(output, RECORDED[f"{index}.output"], atol=3e-6, rtol=1e-5)
    torch.testing.assert_close(l_aux, RECORDED[f"{index}.l_aux"], atol=2e-5, rtol=0)
    assert exp_counts.tolist() == RECORDED[f"{index}.exp_counts"].tolist()
