"""8-bit weights: what they cost in precision and take in memory, against the weights they were made of.

n rows, H hidden size, I intermediate size, E experts; of one projection, O output and C input channels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moeserve import Client, ConfigError, MoELayer, load_config
from moeserve.checkpoints import bank_bytes, layer_sources, load_bank
from moeserve.config import Bits, PlacementConfig
from moeserve.experts import ExpertBank, ExpertShard, FeedForward, QuantizedFeedForward, QuantizedMatrix, quantize
from moeserve.experts.quantized import quantize_matrix
from moeserve.placement import plan_placement
from tests.support.closeness import assert_close
from tests.support.harness import ServiceHarness
from tests.support.stacked import in_full

TYPES: tuple[Bits, ...] = get_args(Bits)
# Rounding an element costs int8 step / sqrt(12), where normal weights have a step of (2.5 to 3.7 sigma) / 127: 0.6 to 0.85 %. fp8 keeps
# three bits of fraction: 2.6 %. A projection passes that on to its sums as it is.
LARGEST_ERROR_OF_WEIGHTS = {"int8": 0.01, "fp8": 0.04}
# Gate, up and down err independently: together about 1.8 times as much.
LARGEST_ERROR = {"int8": 0.016, "fp8": 0.055}
LAYER: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "num_experts": 6, "seed": 3}


def relative(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact.double()).norm() / exact.double().norm())


def drawn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def largest_rounding(matrix: QuantizedMatrix, weight: Tensor, quantization: Bits) -> Tensor:
    """[O, C]: half a step of int8; half a step of fp8's three bits of fraction, where it has them, or of its smallest step, 2^-9."""
    scales = matrix.scales.double()
    half_step = scales / 2 if quantization == "int8" else torch.maximum(weight.abs().double() / 16, scales / 1024)
    # What float32 itself rounds, in the quotient and in the product.
    return half_step + weight.abs().double() * 2**-22


@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 40)),
    seed=st.integers(0, 2**32),
    exponents=st.lists(st.sampled_from([-45, -38, -20, -3, 0, 5, 30, 37]), min_size=1, max_size=9),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    quantization=st.sampled_from(TYPES),
)
@settings(deadline=None)
def test_no_weight_moves_by_more_than_half_a_step(
    shape: tuple[int, int], seed: int, exponents: list[int], dtype: torch.dtype, quantization: Bits
) -> None:
    magnitudes = torch.tensor([10.0 ** exponents[channel % len(exponents)] for channel in range(shape[0])], dtype=torch.float64)
    weight = (drawn(*shape, seed=seed).double() * magnitudes[:, None]).to(dtype)
    matrix = quantize_matrix(weight, quantization)
    moved = (matrix.dequantized().double() - weight.double()).abs()
    assert matrix.codes.dtype.itemsize == 1
    assert matrix.scales.dtype == torch.float32
    assert (moved <= largest_rounding(matrix, weight.float(), quantization)).all()


@pytest.mark.parametrize("quantization", TYPES)
def test_zeros_stay_zeros_and_the_largest_weight_is_kept(quantization: Bits) -> None:
    weight = drawn(5, 16)
    weight[2] = 0
    weight[3] = 3e38
    weight[4] = 1e-45
    weight[0, 7] = -9
    back = quantize_matrix(weight, quantization).dequantized()
    assert back.isfinite().all()
    assert back[2].eq(0).all()
    assert_close(back[[0, 3], [7, 0]][:, None], weight[[0, 3], [7, 0]][:, None], summed=0)


@pytest.mark.parametrize("channels", [0, 1, 7, 64, 192])
@pytest.mark.parametrize("outputs", [0, 1, 5, 64])
@pytest.mark.parametrize("num_rows", [1, 2, 8, 9, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quantization", TYPES)
def test_a_projection_of_any_shape(quantization: Bits, dtype: torch.dtype, num_rows: int, outputs: int, channels: int) -> None:
    matrix = quantize_matrix(drawn(outputs, channels), quantization)
    rows = drawn(num_rows, 2 * channels, seed=1).to(dtype)[:, ::2]
    expected = rows.double() @ matrix.dequantized().double().t()
    ours = matrix.project(rows)
    assert ours.dtype == torch.float32
    assert_close(ours, expected, summed=channels, rounded_to=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quantization", TYPES)
@pytest.mark.parametrize(("hidden_size", "intermediate_size"), [(64, 64), (512, 2048)])
def test_the_error_of_a_layer_is_that_of_its_weights(
    hidden_size: int, intermediate_size: int, quantization: Bits, dtype: torch.dtype
) -> None:
    sizes = {"hidden_size": hidden_size, "intermediate_size": intermediate_size, "num_experts": 4}
    exact, ours = MoELayer(**sizes), MoELayer(**sizes, dtype=dtype, quantization=quantization)
    gate_up, down = (
        [
            relative(getattr(in_full(after), name), getattr(before, name))
            for before, after in zip(exact.bank.experts, ours.bank.experts, strict=True)
        ]
        for name in ("gate_up_proj", "down_proj")
    )
    assert max(gate_up + down) < LARGEST_ERROR_OF_WEIGHTS[quantization]
    # silu(gate) errs a little more than gate does: E[(g silu'(g))^2] = 1.4 E[silu(g)^2] for normal g. Beside 8 bits, bfloat16 costs 0.5 %.
    explained = (sum(down) ** 2 + 2.4 * sum(gate_up) ** 2) ** 0.5 / 4 + (0.002 if dtype == torch.bfloat16 else 0)
    for num_rows in (8, 100):
        rows = drawn(num_rows, hidden_size).to(dtype)
        # A quarter of it, because it counts neither products of errors nor how experts differ; float32 rounds a ten-thousandth of it.
        assert relative(ours(rows), exact(rows.float())) == pytest.approx(explained, rel=0.25)


@pytest.mark.parametrize("quantization", TYPES)
def test_float16_sums_do_not_overflow(quantization: Bits) -> None:
    weight = torch.full((4, 512), 0.01, dtype=torch.float16)
    expert = quantize(FeedForward("relu", weight, weight[:, :4].repeat(128, 1)), quantization)
    rows = torch.full((3, 512), 200.0, dtype=torch.float16)
    assert_close(expert(rows), torch.full((3, 512), 200 * 512 * 4 * float(weight[0, 0]) ** 2), rounded_to=torch.float16)


@pytest.mark.parametrize("quantization", TYPES)
def test_biases_are_left_as_they_were_and_idle_experts_alone(quantization: Bits) -> None:
    (source,) = layer_sources(load_config({"layers": [{**LAYER, "bias": True, "activation": "gelu"}]}))
    experts = [expert for expert in source.experts([ExpertShard(0), ExpertShard(1)]) if isinstance(expert, FeedForward)]
    quantized = [quantize(expert, quantization) for expert in experts]
    for before, after in zip(experts, quantized, strict=True):
        assert before.gate_up_bias is after.gate_up_bias
        assert before.down_bias is after.down_bias
    rows, out = drawn(3, 64), torch.empty(3, 64)
    ExpertBank(quantized, 64, torch.float32).run(rows, torch.arange(3), torch.ones(3, dtype=torch.int64), torch.ones(3), out=out)
    assert_close(out, quantized[1](rows))
    assert relative(out, experts[1](rows)) < LARGEST_ERROR[quantization]


@pytest.mark.parametrize("layer", [{}, {"bias": True, "activation": "relu"}, {"intermediate_size": [8, 24, 3, 16, 40, 1]}], ids=str)
@pytest.mark.parametrize("tensor_parallel", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", TYPES)
def test_a_host_holds_as_many_bytes_as_was_said(quantization: Bits, dtype: str, tensor_parallel: int, layer: dict[str, Any]) -> None:
    layer = {**LAYER, "shared_expert": {"intermediate_size": 40}, **layer}
    (source,) = layer_sources(load_config({"model": {"dtype": dtype, "quantization": quantization}, "layers": [layer]}))
    placement = plan_placement([source.spec], PlacementConfig(num_hosts=3 * tensor_parallel, tensor_parallel=tensor_parallel)).layers[0]
    for host in range(3 * tensor_parallel):
        shards = placement.shards_on(host)
        assert bank_bytes(source, shards) == load_bank(source, shards).nbytes > 0


def test_int8_bytes_are_one_per_weight_and_four_per_channel(tiny_moe: Path) -> None:
    (source, *_) = layer_sources(load_config({"model": {"checkpoint": tiny_moe, "quantization": "int8"}}))
    bank = load_bank(source, [ExpertShard(5)])
    assert all(isinstance(expert, QuantizedFeedForward) for expert in bank.experts)
    assert bank.nbytes == bank_bytes(source, [ExpertShard(5)]) == 3 * 128 * 256 + 4 * (2 * 256 + 128)


@pytest.mark.parametrize("quantization", TYPES)
@pytest.mark.parametrize("hosts", [1, 3])
def test_service_equals_layer(quantization: Bits, hosts: int, tiny_moe: Path, tmp_path: Path) -> None:
    local = MoELayer.from_checkpoint(tiny_moe, 1, dtype=torch.float32, quantization=quantization)
    exact = MoELayer.from_checkpoint(tiny_moe, 1, dtype=torch.float32)
    config = {"model": {"checkpoint": tiny_moe, "dtype": "float32", "quantization": quantization}, "placement": {"num_hosts": hosts}}
    with ServiceHarness(config, "shm", tmp_path) as service, Client(service.target) as client:
        for num_tokens in (0, 1, 200):
            rows = drawn(num_tokens, 128)
            ours = client.forward(rows, layer=1).hidden_states
            assert_close(ours, local(rows))
            assert not num_tokens or 1e-3 < relative(ours, exact(rows)) < LARGEST_ERROR[quantization]


@pytest.mark.parametrize("quantization", TYPES)
def test_shards_of_an_expert_and_a_shared_expert(quantization: Bits, tmp_path: Path) -> None:
    layer = {**LAYER, "bias": True, "shared_expert": {"intermediate_size": 40}}
    config = {"model": {"quantization": quantization}, "layers": [layer], "placement": {"num_hosts": 4, "tensor_parallel": 2}}
    exact = MoELayer(**layer)
    with ServiceHarness(config, "local", tmp_path) as service, Client(service.target) as client:
        rows = drawn(50, 64)
        assert 1e-3 < relative(client.forward(rows, layer=0).hidden_states, exact(rows)) < LARGEST_ERROR[quantization]


def test_experts_are_quantized_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    (source,) = layer_sources(load_config({"model": {"quantization": "int8"}, "layers": [LAYER]}))
    asked: list[int] = []
    read = type(source).experts
    monkeypatch.setattr(type(source), "experts", lambda self, shards: asked.append(len(shards)) or read(self, shards))
    load_bank(source, [ExpertShard(expert) for expert in range(6)])
    assert asked == [1] * 6


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"quantization": "int4"}, r"model\.quantization: Input should be 'int8', 'fp8' or 'none' \(got 'int4'\)"),
        (
            {"intermediate_size": None, "expert": "torch.nn:Linear", "expert_args": {"in_features": 64, "out_features": 64}},
            r"model\.quantization is 'int8', but the experts of layer layers\.0 are modules; allowed: only feed-forward experts",
        ),
    ],
)
def test_what_cannot_be_quantized_is_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        MoELayer(**{**LAYER, "quantization": "int8", **changes})
