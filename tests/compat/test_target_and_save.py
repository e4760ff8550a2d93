"""A layer that was saved, served and asked with target= answers as it did in process."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moeserve import Client, MoELayer
from moeserve.compat import save_layers
from moeserve.compat.colossalai import Experts, MoeLayer, Top1Router, Top2Router
from moeserve.compat.deepspeed import MoE
from moeserve.errors import ConfigError, UnknownLayer
from tests.support.closeness import assert_close
from tests.support.harness import ServiceHarness

from .modules import EXPERTS, HIDDEN, Block, Counting, sequential, shaken

CERTAIN = {"num_experts": EXPERTS, "use_rts": False, "top2_2nd_expert_sampling": False, "eval_capacity_factor": 0.7, "min_capacity": 2}
EXPERT_KINDS: dict[str, tuple[Any, dict[str, Any] | None]] = {
    "sequential": (sequential(), None),
    "relu without bias": (sequential(activation=nn.ReLU, bias=False), None),
    "module": (Block(24), {"width": 24}),
    "module of defaults": (Block(), None),
    "torch": (nn.Linear(HIDDEN, HIDDEN), {"in_features": HIDDEN, "out_features": HIDDEN}),
}


def deepspeed(kind: str, **parameters: Any) -> MoE:
    layer: MoE = shaken(MoE(HIDDEN, copy.deepcopy(EXPERT_KINDS[kind][0]), **{**CERTAIN, **parameters}))  # type: ignore[assignment]
    return layer


def served(folder: Path, tmp_path: Path, **placement: Any) -> ServiceHarness:
    config = {"model": {"checkpoint": folder, "trusted_modules": ["tests.compat"]}, "placement": {"num_hosts": 2, **placement}}
    return ServiceHarness(config, "local", tmp_path)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(
    ("k", "kind"), [(1, "sequential"), (2, "module"), (3, "relu without bias"), (2, "torch"), (1, "module of defaults")]
)
@torch.no_grad()
def test_deepspeed(kind: str, k: int, residual: bool, tmp_path: Path) -> None:
    layer = deepspeed(kind, k=k, use_residual=residual)
    layer.save(tmp_path / "saved", expert_args=EXPERT_KINDS[kind][1])
    x = torch.randn(2, 15, HIDDEN)
    output, l_aux, exp_counts = layer(x)
    local = MoELayer.from_checkpoint(tmp_path / "saved", trusted_modules=["tests"])
    assert_close(local(x.view(-1, HIDDEN)).view_as(x), output)
    with served(tmp_path / "saved", tmp_path) as service:
        remote = MoE(HIDDEN, EXPERT_KINDS[kind][0], k=k, use_residual=residual, target=service.target, **CERTAIN).eval()
        there = remote(x)
        assert_close(there[0], output)
        assert_close(there[1], l_aux, summed=HIDDEN + EXPERTS + 30)
        assert there[2].tolist() == exp_counts.tolist() == remote.deepspeed_moe.exp_counts.tolist()
        if not residual:
            used = torch.arange(30) % 3 > 0
            here, there = layer(x, used), copy.deepcopy(remote)(x, used)
            assert_close(there[0], here[0])
            assert there[2].tolist() == here[2].tolist()
    assert set(remote.state_dict()) == {"deepspeed_moe.gate.wg.weight"}


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("expert", [sequential, Block])
@torch.no_grad()
def test_colossalai(k: int, expert: Any, tmp_path: Path) -> None:
    router = {1: Top1Router, 2: Top2Router}[k](capacity_factor_eval=0.8, min_capacity=0)
    layer = shaken(MoeLayer(HIDDEN, EXPERTS, router, Experts(expert, EXPERTS, width=24)))
    layer.save(tmp_path / "saved", name="blocks.3.moe")  # type: ignore[operator]
    x = torch.randn(3, 11, HIDDEN)
    with served(tmp_path / "saved", tmp_path) as service, Client(service.target) as client:
        remote = MoeLayer(HIDDEN, EXPERTS, router, None, target=client, layer="blocks.3.moe").eval()
        for here, there in zip(layer(x), remote(x), strict=True):
            assert_close(there, here, summed=4 * HIDDEN + 33)
    assert set(remote.state_dict()) == {"gate_weight"}


@torch.no_grad()
def test_several_layers_over_shards(tmp_path: Path) -> None:
    layers = {"first": deepspeed("sequential", k=2), "second": deepspeed("sequential", k=1, use_residual=True)}
    save_layers(tmp_path / "saved", layers)
    x = torch.randn(30, HIDDEN)
    with served(tmp_path / "saved", tmp_path, num_hosts=4, tensor_parallel=2, copies=2) as service:
        for name, layer in layers.items():
            remote = MoE(HIDDEN, nn.Identity(), k=2 - list(layers).index(name), target=service.target, layer=name, **CERTAIN).eval()
            assert_close(remote(x)[0], layer(x)[0])


@torch.no_grad()
def test_experts_of_unequal_sizes(tmp_path: Path) -> None:
    x = torch.randn(30, HIDDEN)
    for make, args in ((sequential, None), (Block, [{"width": 8 + expert} for expert in range(EXPERTS)])):
        layer = deepspeed("sequential", k=2, use_residual=True)
        layer.deepspeed_moe.experts.deepspeed_experts = nn.ModuleList([make(8 + expert) for expert in range(EXPERTS)])  # type: ignore
        layer.mlp = make(8)
        layer.save(tmp_path / make.__name__, expert_args=args)
        local = MoELayer.from_checkpoint(tmp_path / make.__name__, trusted_modules=["tests.compat.modules"])
        assert_close(local(x), layer(x)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_in_this_process_can_be_saved(dtype: torch.dtype, tiny_moe: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": HIDDEN, "num_experts": 6, "identity_experts": 1}
    linear = {"expert": "torch.nn:Linear", "expert_args": {"in_features": HIDDEN, "out_features": HIDDEN}}
    layers = {
        "plain": MoELayer(**sizes, intermediate_size=(4, 5, 6, 7, 8), bias=True, dtype=dtype),
        "shared": MoELayer(**sizes, intermediate_size=8, shared_expert={"intermediate_size": 9, "mixing": "sigmoid"}, dtype=dtype),
        "modules": MoELayer(**sizes, **linear, dtype=dtype),
        "tiny": MoELayer.from_checkpoint(tiny_moe, 1, dtype=dtype),
    }
    save_layers(tmp_path, layers)
    for name, layer in layers.items():
        read = MoELayer.from_checkpoint(tmp_path, name)
        rows = torch.randn(20, layer.spec.hidden_size)
        assert_close(read(rows), layer(rows), rounded_to=dtype)
        assert (read.spec.gating, read.spec.dtype) == (layer.spec.gating, layer.spec.dtype)
    layers["plain"].save(tmp_path)
    assert [layer["name"] for layer in json.loads((tmp_path / "config.json").read_text())["layers"]] == ["layers.0"]
    with pytest.raises(ConfigError, match='few bits cannot be saved; allowed: those of a layer loaded with quantization = "none"'):
        MoELayer.from_checkpoint(tmp_path, "layers.0", quantization="int8").save(tmp_path / "quantized")


class Doubled(nn.Linear):
    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(rows)


class InThisFile(nn.Linear):
    class Inner(nn.Linear):
        pass


@pytest.mark.parametrize(
    ("expert", "args", "sentence"),
    [
        (
            nn.Linear(HIDDEN, HIDDEN),
            None,
            "give save.folder, expert_args=.* what torch.nn.modules.linear:Linear is made with: .*in_features",
        ),
        (Block(24), None, "made with {} has other tensors than the layer's; give save"),
        (Block(24), [{"width": 24}], "expert_args has 1 tables; allowed: one, or one for each of 6"),
        (Block(24), {"width": torch.ones(1)}, "a checkpoint can hold numbers, strings"),
        (nn.Sequential(Doubled(HIDDEN, 8), nn.GELU(), nn.Linear(8, HIDDEN)), None, "Sequential.* has other tensors than the layer's"),
        (InThisFile.Inner(HIDDEN, HIDDEN), {}, "InThisFile.Inner of .* cannot be imported by a service"),
        (Counting(), None, r"layers.0.experts.0.count is int64; allowed in a checkpoint: float32"),
    ],
)
def test_experts_that_cannot_be_saved(expert: nn.Module, args: Any, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=sentence):
        MoE(HIDDEN, expert, **CERTAIN).save(tmp_path / "saved", expert_args=args)
    assert not (tmp_path / "saved").exists()


def test_no_arguments_are_asked_for_where_none_are_needed(tmp_path: Path) -> None:
    deepspeed("sequential", use_residual=True).save(tmp_path, expert_args=[])
    with pytest.raises(ConfigError, match="expert_args has 0 tables"):
        deepspeed("module", use_residual=True).save(tmp_path, expert_args=[])


def test_a_folder_of_another_kind_is_left_alone(tiny_moe: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((tiny_moe / "config.json").read_text())
    with pytest.raises(ConfigError, match="holds a checkpoint of another kind"):
        deepspeed("sequential").save(tmp_path)
    with pytest.raises(ConfigError, match="different names"):
        save_layers(tmp_path, {})


def test_mistakes_with_target(tmp_path: Path) -> None:
    deepspeed("sequential", k=2, use_residual=True).save(tmp_path / "saved")
    with served(tmp_path / "saved", tmp_path) as service:
        remote = MoE(HIDDEN, nn.Identity(), k=2, use_residual=True, target=service.target, **CERTAIN)
        x = torch.randn(3, HIDDEN)
        with pytest.raises(ConfigError, match="evaluation mode only, because gradients do not travel"):
            remote(x)
        with pytest.raises(ConfigError, match="used_token cannot be given with use_residual and target="):
            remote.eval()(x, torch.ones(3))
        with pytest.raises(ConfigError, match="they are in the service"):
            remote.save(tmp_path / "again")
        with pytest.raises(ConfigError, match=r"served layer layers\.0 has top_k = 2; this layer has 1"):
            MoE(HIDDEN, nn.Identity(), k=1, target=service.target, **CERTAIN).eval()(x)
        with pytest.raises(UnknownLayer, match=r"no layer 7; served: layers\.0"):
            MoE(HIDDEN, nn.Identity(), k=2, target=service.target, layer=7, **CERTAIN).eval()(x)
    with pytest.raises(ConfigError, match="experts is None"):
        MoeLayer(HIDDEN, EXPERTS, Top1Router(), None)
