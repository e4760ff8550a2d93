"""Random layers: the same wherever they are drawn, and none like another.

E experts, H hidden size, I intermediate size.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch

from moeserve import load_config
from moeserve.checkpoints import LayerSource, layer_sources
from tests.support.stacked import Stacked, stacked, whole

LAYER = {"hidden_size": 48, "intermediate_size": 32, "num_experts": 6, "bias": True}


def drawn(dtype: str | None = None, **changes: Any) -> LayerSource:
    (source,) = layer_sources(load_config({"model": {"dtype": dtype}, "layers": [LAYER | changes]}))
    return source


def tensors(weights: Stacked) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in weights._asdict().items() if tensor is not None}


def test_the_same_seed_gives_the_same_layer() -> None:
    one, other = drawn(seed=7), drawn(seed=7)
    assert torch.equal(one.router().gate, other.router().gate)
    for name, tensor in tensors(stacked(one.experts(whole(range(6))))).items():
        assert torch.equal(tensor, tensors(stacked(other.experts(whole(range(6)))))[name]), name


def test_another_seed_gives_another_layer() -> None:
    one, other = drawn(seed=7), drawn(seed=8)
    assert not torch.equal(one.router().gate, other.router().gate)
    for name, tensor in tensors(stacked(one.experts(whole(range(6))))).items():
        assert not torch.equal(tensor, tensors(stacked(other.experts(whole(range(6)))))[name]), name


@pytest.mark.parametrize("held", [[5], [1, 3], [4, 0, 2]], ids=str)
def test_some_experts_are_those_of_the_whole(held: list[int]) -> None:
    source = drawn()
    every = tensors(stacked(source.experts(whole(range(6)))))
    for name, tensor in tensors(stacked(source.experts(whole(held)))).items():
        assert torch.equal(tensor, every[name][held]), name


def test_no_two_experts_are_alike() -> None:
    for name, tensor in tensors(stacked(drawn().experts(whole(range(6))))).items():
        assert not any(torch.equal(tensor[a], tensor[b]) for a, b in combinations(range(6), 2)), name


@pytest.mark.parametrize(("activation", "projected"), [("swiglu", 64), ("geglu", 64), ("gelu", 32), ("relu", 32)])
def test_shapes_follow_the_activation(activation: str, projected: int) -> None:
    weights = stacked(drawn(activation=activation).experts(whole([0, 1])))
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors(weights).items()}
    assert shapes == {"gate_up_proj": (2, projected, 48), "down_proj": (2, 48, 32), "gate_up_bias": (2, projected), "down_bias": (2, 48)}
    plain = stacked(drawn(activation=activation, bias=False).experts(whole([0])))
    assert plain.gate_up_bias is None
    assert plain.down_bias is None


def test_weights_are_of_the_size_that_keeps_answers_in_bounds() -> None:
    weights = stacked(drawn().experts(whole(range(6))))
    for tensor, channels in ((weights.gate_up_proj, 48), (weights.down_proj, 32), (drawn().router().gate, 48)):
        # The deviation of n draws is off by about 1 / sqrt(2 n); five times that.
        assert tensor.std().item() == pytest.approx(channels**-0.5, rel=5 / (2 * tensor.numel()) ** 0.5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_another_type_rounds_the_same_weights(dtype: str) -> None:
    exact, rounded = stacked(drawn().experts(whole([3]))), stacked(drawn(dtype).experts(whole([3])))
    assert rounded.gate_up_proj.dtype == getattr(torch, dtype)
    assert torch.equal(exact.gate_up_proj.to(rounded.gate_up_proj.dtype), rounded.gate_up_proj)
    assert drawn(dtype).router().gate.dtype == torch.float32
