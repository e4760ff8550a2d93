"""What stands between the projections, against its definition, and how it is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.activations import ACT2FN

from moeserve import ConfigError, MoELayer, load_config
from moeserve.config import LIMITED, ActivationName, parsed_activation
from moeserve.experts import is_gated
from moeserve.experts.activations import activate

Definition = Callable[[Tensor, Tensor, float], Tensor]

GATED: dict[str, Definition] = {
    "swiglu": lambda gate, up, limit: ACT2FN["silu"](gate.clamp(max=limit)) * up.clamp(-limit, limit),
    "swiglu_post": lambda gate, up, limit: ACT2FN["silu"](gate).clamp(max=limit) * up.clamp(-limit, limit),
    "swigluoai": lambda gate, up, limit: (
        (up.clamp(-limit, limit) + 1) * gate.clamp(max=limit) * torch.sigmoid(1.702 * gate.clamp(max=limit))
    ),
    "geglu": lambda gate, up, limit: ACT2FN["gelu"](gate) * up,
    "geglu_tanh": lambda gate, up, limit: ACT2FN["gelu_pytorch_tanh"](gate) * up,
}
POINTWISE = {"gelu": "gelu", "relu": "relu", "relu2": "relu2"}


def some_numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 10


def test_each_is_tested() -> None:
    assert set(GATED) | set(POINTWISE) == set(get_args(ActivationName))


@pytest.mark.parametrize("limit", [None, 0.5, 7.0, 1e3])
@pytest.mark.parametrize("name", GATED)
def test_gated(name: str, limit: float | None) -> None:
    if name not in LIMITED and limit is not None:
        return
    activation = name if limit is None else f"{name}({limit})"
    gate, up = some_numbers(2, 33, 24)
    expected = GATED[name](gate, up, parsed_activation(activation)[1] or torch.inf)
    assert is_gated(activation)
    # Kernels for rows and for columns round their functions of gate differently, and up multiplies that.
    bound = 8 * torch.finfo(torch.float32).eps * gate.abs().max().item() * (up.abs().max().item() + 1)
    for ours in (activate(torch.cat([gate, up], dim=1), activation, dim=1), activate(torch.cat([gate.t(), up.t()]), activation, dim=0).t()):
        assert (ours - expected).abs().max() <= bound


@pytest.mark.parametrize("name", POINTWISE)
def test_without_a_gate(name: str) -> None:
    hidden = some_numbers(33, 24)
    assert not is_gated(name)
    torch.testing.assert_close(activate(hidden.clone(), name, dim=1), ACT2FN[POINTWISE[name]](hidden))


@given(st.sampled_from(sorted(LIMITED)), st.floats(min_value=1e-30, max_value=1e30))
def test_a_limit_is_read_as_it_was_written(name: str, limit: float) -> None:
    assert parsed_activation(f"{name}({limit})") == (name, limit)


@given(st.text())
def test_what_is_no_activation_is_one_sentence(text: str) -> None:
    if text not in get_args(ActivationName):
        with pytest.raises(ValueError, match=r"activation is .*; allowed"):
            parsed_activation(text)


@pytest.mark.parametrize("text", ["swiglu(0)", "swiglu(-1)", "swiglu(nan)", "swiglu(inf)", "swiglu()", "relu2(3)", "swiglu (3)", "swigly"])
def test_in_a_configuration(text: str) -> None:
    layer: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_experts": 2, "activation": text}
    with pytest.raises(ConfigError, match=r"layers\.0\.activation is .*; allowed"):
        load_config({"layers": [layer]})


@pytest.mark.parametrize("activation", ["swiglu(0.5)", "relu2", "geglu_tanh", "swiglu_post(0.5)"])
def test_a_layer_is_saved_with_it(activation: str, tmp_path: Any) -> None:
    layer = MoELayer(hidden_size=8, intermediate_size=8, num_experts=2, activation=activation)
    layer.save(tmp_path, "layer")
    again, rows = MoELayer.from_checkpoint(tmp_path), some_numbers(5, 8)
    assert again.spec.activation == activation
    assert torch.equal(again(rows), layer(rows))


@pytest.mark.parametrize("activation", ["swiglu(0.5)", "relu2", "geglu_tanh"])
def test_quantized(activation: str) -> None:
    settings: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 32, "num_experts": 2, "activation": activation}
    rows = some_numbers(5, 64) / 10
    exact, rounded = MoELayer(**settings)(rows), MoELayer(**settings, quantization="int8")(rows)
    assert (exact - rounded).norm() < 0.03 * exact.norm()
