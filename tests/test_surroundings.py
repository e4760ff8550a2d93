"""What a program has set for tensors of its own, as a default device or type, changes nothing of a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from moeserve import ForwardOutput, GatingConfig, MoELayer, route

SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_experts": 8}
TIGHT = {"capacity_factor": 1.0, "renormalize": "post_drop", "seed": 3}
LAYERS: dict[str, dict[str, Any]] = {
    "softmax": {"gating": GatingConfig(top_k=2)},
    "groups": {
        "gating": GatingConfig(top_k=3, scoring_func="sigmoid", num_expert_groups=4, topk_groups=2, group_score="top2_sum"),
        "shared_expert": {"intermediate_size": 8, "mixing": "sigmoid"},
    },
    "chance": {"gating": GatingConfig(top_k=2, noise="gumbel_second", drop_policy="random", **TIGHT)},
    "noise": {"gating": GatingConfig(top_k=2, noise="normal", noise_scale=1.0, **TIGHT), "identity_experts": 2},
    "experts choose": {"gating": GatingConfig(top_k=2, routing="expert_choice", capacity_factor=1.0), "kernel": "torch"},
    "deterministic": {"gating": GatingConfig(top_k=2, scoring_func="sigmoid"), "deterministic": True},
    "int8": {"gating": GatingConfig(top_k=2), "quantization": "int8", "bias": True},
}


@contextmanager
def default_type(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


#: the meta device stands for a GPU: what is on either is not where compiled code looks for it
SETTINGS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "device": lambda: torch.device("meta"),
    "float64": lambda: default_type(torch.float64),
    "bfloat16": lambda: default_type(torch.bfloat16),
}


def made(name: str) -> MoELayer:
    return MoELayer(**SIZES, **{"kernel": "generic", **LAYERS[name]})


def answer(layer: MoELayer, rows: torch.Tensor) -> ForwardOutput:
    return layer.run(rows, used_token=rows[:, 0] < 1, return_routing=True)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_and_its_answers(name: str, setting: str) -> None:
    rows = torch.randn(40, 16, generator=torch.Generator().manual_seed(1))
    layer = made(name)
    expected = answer(layer, rows)
    with SETTINGS[setting]():
        answers = answer(layer, rows), answer(made(name), rows)
    for each in answers:
        for field in ("hidden_states", "requested", "processed", "dropped", "dropped_tokens", "topk_ids", "topk_weights", "slots"):
            assert torch.equal(getattr(each, field), getattr(expected, field)), field
        assert (each.aux_loss, each.z_loss) == (expected.aux_loss, expected.z_loss)


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_layer_of_a_checkpoint(setting: str, tmp_path: Path) -> None:
    rows = torch.randn(40, 16, generator=torch.Generator().manual_seed(1))
    layer = made("groups")
    with SETTINGS[setting]():
        layer.save(tmp_path)
        loaded = MoELayer.from_checkpoint(tmp_path, kernel="generic")
    assert torch.equal(loaded(rows), layer(rows))


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(
    "gating", [GatingConfig(), GatingConfig(scoring_func="sigmoid", renormalize="pre_drop", capacity_factor=0.5)], ids=["plain", "tight"]
)
def test_a_gate_alone(gating: GatingConfig, setting: str) -> None:
    logits = torch.randn(40, 16, generator=torch.Generator().manual_seed(1))
    expected = route(logits, gating)
    with SETTINGS[setting]():
        routing = route(logits, gating)
    for field in ("topk_ids", "topk_weights", "kept", "dropped_tokens", "requested", "processed", "dropped", "slots", "drop_reasons"):
        assert torch.equal(getattr(routing, field), getattr(expected, field)), field
    assert (routing.aux_loss, routing.z_loss) == (expected.aux_loss, expected.z_loss)
