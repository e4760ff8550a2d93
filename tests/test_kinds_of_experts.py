"""Shared experts, experts without weights, modules, unequal sizes, weights on the input side: the layer against a sum in float64.

T tokens, H hidden size, I intermediate size, E experts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moeserve import ConfigError, GatingConfig, MoELayer, load_config, route
from moeserve.checkpoints import LayerSource, layer_sources
from moeserve.config import PlacementConfig
from moeserve.experts import ExpertShard, FeedForward, ModuleExpert
from moeserve.placement import plan_placement
from tests.support.closeness import assert_close
from tests.support.kinds_of_experts import BLOCK, EXPERTS, HIDDEN, KINDS, SUMMED


def source_of(kind: str, **gating: Any) -> LayerSource:
    layer = {"hidden_size": HIDDEN, "num_experts": EXPERTS, "gating": gating, "seed": 5, **KINDS[kind]}
    return layer_sources(load_config({"layers": [layer]}))[0]


def whole_answer(expert: Any, rows: Tensor) -> Tensor:
    """rows [T, H] float64, computed by the definition of the expert."""
    if isinstance(expert, ModuleExpert):
        answer: Tensor = expert.module.double()(rows)[0].detach()
        expert.module.float()
        return answer
    assert isinstance(expert, FeedForward)
    projected = F.linear(rows, expert.gate_up_proj.double(), None if expert.gate_up_bias is None else expert.gate_up_bias.double())
    gate, up = projected.chunk(2, dim=1)
    return F.linear(F.silu(gate) * up, expert.down_proj.double(), None if expert.down_bias is None else expert.down_bias.double())


def dense(source: LayerSource, rows: Tensor, used: Tensor, scale_inputs: bool) -> Tensor:
    """The layer's answer in float64, from its parts."""
    router, spec = source.router(), source.spec
    combine = route(F.linear(rows.float(), router.gate), spec.gating, used_token=used).dense().double()
    rows = rows.double()
    total = torch.zeros(rows.shape, dtype=torch.float64)
    experts = source.experts([ExpertShard(expert) for expert in range(spec.num_hosted_experts)])
    for index in range(spec.num_experts):
        weight = combine[:, index, None]
        if index < len(experts):
            answer = whole_answer(experts[index], rows * weight if scale_inputs else rows)
            total += answer * (weight != 0) if scale_inputs else answer * weight
        elif index < len(experts) + spec.identity_experts:
            total += weight * rows
    shared, mixer = source.shared_expert(), source.mixer()
    if shared is not None and mixer is not None:
        logits = None if mixer.weight is None else F.linear(rows, mixer.weight.double())
        scales = {
            "add": lambda: (1.0, 1.0),
            "sigmoid": lambda: (1.0, torch.sigmoid(logits)),
            "residual": lambda: tuple(torch.softmax(logits, dim=1)[:, part, None] for part in (0, 1)),
        }[mixer.mixing]()
        total = total * scales[0] + whole_answer(shared, rows) * scales[1] * used[:, None]
    return total


@pytest.mark.parametrize("scale_inputs", [False, True], ids=["outputs weighed", "inputs weighed"])
@pytest.mark.parametrize("gating", [{"top_k": 3}, {"top_k": 2, "capacity_factor": 0.3}], ids=["dropless", "most are dropped"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_layer_is_the_sum_of_its_parts(kind: str, gating: dict[str, Any], scale_inputs: bool) -> None:
    if scale_inputs and kind == "residual":
        with pytest.raises(ConfigError, match="cannot be combined"):
            source_of(kind, **gating, scale_inputs=scale_inputs)
        return
    source = source_of(kind, **gating, scale_inputs=scale_inputs)
    rows, used = torch.randn(40, HIDDEN, generator=torch.Generator().manual_seed(1)), torch.arange(40) % 5 != 2
    layer = MoELayer(hidden_size=HIDDEN, num_experts=EXPERTS, gating=source.spec.gating, seed=5, **KINDS[kind])
    out = layer.run(rows, used_token=used)
    assert_close(out.hidden_states, dense(source, rows, used, scale_inputs), SUMMED)
    assert out.requested.sum() == source.spec.gating.top_k * used.sum()
    assert out.hidden_states[~used].eq(0).all()


def test_a_caller_who_routes_gets_the_experts_he_names_alone() -> None:
    layer = MoELayer(hidden_size=HIDDEN, num_experts=EXPERTS, seed=5, **KINDS["residual"])
    plain = MoELayer(hidden_size=HIDDEN, num_experts=EXPERTS, seed=5, intermediate_size=24)
    rows, ids = torch.randn(9, HIDDEN), torch.arange(9)[:, None] % EXPERTS
    chosen = {"topk_ids": ids, "topk_weights": torch.rand(9, 1)}
    assert_close(layer.run(rows, **chosen).hidden_states, plain.run(rows, **chosen).hidden_states)


def test_modules_are_not_split() -> None:
    layer = {"hidden_size": HIDDEN, "num_experts": EXPERTS, **KINDS["module"]}
    with pytest.raises(ConfigError, match=r"placement\.tensor_parallel must be 1: the experts of layer layers\.0 are modules"):
        plan_placement([layer_sources(load_config({"layers": [layer]}))[0].spec], PlacementConfig(num_hosts=2, tensor_parallel=2))


@pytest.mark.parametrize(
    ("layer", "sentence"),
    [
        ({"intermediate_size": [1, 2]}, "layers.0.intermediate_size has 2 numbers"),
        ({"intermediate_size": 4, "zero_experts": 6}, "allowed: less than layers.0.num_experts = 6"),
        ({"intermediate_size": 4, "expert": BLOCK}, "layers.0.intermediate_size has no meaning with layers.0.expert"),
        ({"intermediate_size": 4, "expert_args": {"width": 4}}, "layers.0.expert_args needs layers.0.expert"),
        ({"expert": "nowhere:Class"}, "expert 'nowhere:Class' cannot be imported"),
        ({"expert": BLOCK, "expert_args": {"height": 4}}, "cannot be made with {'height': 4}"),
        (
            {"expert": "torch.nn:MultiheadAttention", "expert_args": {"embed_dim": 7, "num_heads": 2}},
            ": embed_dim must be divisible",
        ),
        ({"expert": "torch.nn:LazyLinear", "expert_args": {"out_features": HIDDEN}}, "allowed: modules that are not lazy"),
        ({"expert": "collections:OrderedDict"}, "makes a OrderedDict; allowed: an nn.Module"),
        ({"expert": BLOCK, "expert_args": {"width": 5}}, "cannot take rows of hidden_size 16"),
        (
            {"expert": "torch.nn:MultiheadAttention", "expert_args": {"embed_dim": 5, "num_heads": 2}},
            ": embed_dim must be divisible by num_heads",
        ),
    ],
)
def test_experts_that_cannot_be_are_refused(layer: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        MoELayer(hidden_size=HIDDEN, num_experts=EXPERTS, gating=GatingConfig(top_k=1), **layer)(torch.zeros(1, HIDDEN))
    assert sentence in str(refusal.value)


def test_an_expert_whose_module_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_expert_for_test.py").write_text("raise RuntimeError('no key')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match="expert 'broken_expert_for_test:Class' cannot be imported: no key"):
        MoELayer(hidden_size=HIDDEN, num_experts=EXPERTS, expert="broken_expert_for_test:Class")
