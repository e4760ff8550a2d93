"""Families that transformers does not have, by their published keys and names.

T tokens, H hidden size, E experts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from moeserve import CheckpointError, MoELayer
from moeserve.checkpoints.families import FAMILIES
from tests.checkpoints.saved import rewritten, saved, tensors_of
from tests.checkpoints.tiny_models import some_tokens
from tests.support.checkpoints_on_disk import write_folder

H, INNER, E, K = 32, 24, 8, 3
LING = {
    "model_type": "bailing_moe",
    "num_hidden_layers": 2,
    "hidden_size": H,
    "hidden_act": "silu",
    "moe_intermediate_size": INNER,
    "intermediate_size": 40,
    "num_experts": E,
    "num_experts_per_tok": K,
    "num_shared_experts": 2,
    "norm_topk_prob": True,
    "first_k_dense_replace": 1,
    "use_bias": False,
}
LING_2 = {
    **LING,
    "score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "num_shared_experts": 1,
}


def ling_tensors(num_shared: int, bias: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = {"gate.weight": (E, H)}
    for name, size in [*((f"experts.{expert}", INNER) for expert in range(E)), ("shared_experts", num_shared * INNER)]:
        shapes |= {f"{name}.gate_proj.weight": (size, H), f"{name}.up_proj.weight": (size, H), f"{name}.down_proj.weight": (H, size)}
    tensors = {f"model.layers.1.mlp.{name}": torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}
    return tensors | ({"model.layers.1.mlp.gate.expert_bias": torch.randn(E, generator=generator) * 0.1} if bias else {})


def expert(tensors: Mapping[str, Tensor], name: str, row: Tensor) -> Tensor:
    gate, up, down = (tensors[f"model.layers.1.mlp.{name}.{part}_proj.weight"] for part in ("gate", "up", "down"))
    return down @ (F.silu(gate @ row) * (up @ row))


def ling(config: Mapping[str, Any], tensors: Mapping[str, Tensor], rows: Tensor) -> Tensor:
    """[T, H] -> [T, H], token by token, as the published modelling code defines it."""
    answer = torch.empty_like(rows)
    for token, row in enumerate(rows):
        logits = tensors["model.layers.1.mlp.gate.weight"] @ row
        if config.get("score_function") == "sigmoid":
            scores = logits.sigmoid()
            ranked = scores + tensors["model.layers.1.mlp.gate.expert_bias"]
            groups = ranked.view(config["n_group"], -1)
            best = groups.topk(2, dim=1).values.sum(dim=1).topk(config["topk_group"]).indices
            allowed = torch.zeros_like(groups, dtype=torch.bool)
            allowed[best] = True
            ranked = ranked.masked_fill(~allowed.flatten(), -torch.inf)
        else:
            scores = ranked = logits.softmax(dim=0)
        chosen = ranked.topk(config["num_experts_per_tok"]).indices
        weights = scores[chosen] / scores[chosen].sum() * config.get("routed_scaling_factor", 1.0)
        routed = sum(weight * expert(tensors, f"experts.{index}", row) for weight, index in zip(weights, chosen.tolist(), strict=True))
        answer[token] = routed + expert(tensors, "shared_experts", row)
    return answer


@pytest.mark.parametrize("config", [LING, LING_2], ids=["Ling", "Ling 2.0"])
def test_ling(config: dict[str, Any], tmp_path: Path) -> None:
    tensors = ling_tensors(config["num_shared_experts"], bias="score_function" in config)
    layer, rows = MoELayer.from_checkpoint(write_folder(tmp_path / "model", config, tensors)), some_tokens(33)
    assert layer.spec.name == "model.layers.1.mlp"
    expected = ling(config, tensors, rows)
    torch.testing.assert_close(layer(rows), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"score_function": "tanh"}, r'score_function must be one of softmax, sigmoid, but is "tanh"'),
        # It would keep its score, which nobody has published.
        ({"num_experts_per_tok": 1}, r"num_experts_per_tok must be a whole number of at least 2, but is 1"),
    ],
)
def test_what_no_ling_has(change: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"config\.json: {sentence}"):
        MoELayer.from_checkpoint(write_folder(tmp_path / "model", LING | change, ling_tensors(2, bias=False)))


@pytest.mark.parametrize(("model_type", "kin"), [("kimi_k2", "deepseek_v3"), ("minimax_m1", "mixtral")])
def test_the_rules_of_another_family(model_type: str, kin: str, tmp_path: Path) -> None:
    folder = rewritten(saved(kin), tmp_path, tensors_of(saved(kin)), model_type=model_type)
    assert torch.equal(MoELayer.from_checkpoint(folder)(some_tokens(33)), MoELayer.from_checkpoint(saved(kin))(some_tokens(33)))


def test_minimax_m1_has_no_shared_expert(tmp_path: Path) -> None:
    folder = rewritten(saved("mixtral"), tmp_path, tensors_of(saved("mixtral")), model_type="minimax_m1", shared_intermediate_size=40)
    with pytest.raises(CheckpointError, match=r"config\.json: shared_intermediate_size is 40, but"):
        MoELayer.from_checkpoint(folder)


PUBLISHED = {"model_type": "kimi_k25", "text_config": {"model_type": "kimi_k2"}}


def test_kimi_k25_as_published(tmp_path: Path) -> None:
    tensors = {f"language_model.{name}": tensor for name, tensor in tensors_of(saved("deepseek_v3")).items()}
    own = rewritten(saved("deepseek_v3"), tmp_path / "own", {})
    text = json.loads((own / "config.json").read_text()) | PUBLISHED["text_config"]
    folder = write_folder(tmp_path / "model", PUBLISHED | {"text_config": text}, tensors)
    assert torch.equal(MoELayer.from_checkpoint(folder)(some_tokens(33)), MoELayer.from_checkpoint(saved("deepseek_v3"))(some_tokens(33)))


@pytest.mark.parametrize(("changes", "layers"), [({}, [1]), ({"moe_layer_freq": [1, 0]}, [0]), ({"moe_layer_freq": 2}, [])])
def test_which_layers_of_mimo(changes: dict[str, Any], layers: list[int], tmp_path: Path) -> None:
    """As published: `moe_layer_freq` in place of transformers' `mlp_layer_types`, and a scaling factor that is null."""
    config = {"num_hidden_layers": 2, "first_k_dense_replace": 1} | changes
    assert [index for index in range(2) if FAMILIES["mimo_v2_flash"].is_moe_layer(config, index)] == layers
    assert FAMILIES["mimo_v2_flash"].gating({"routed_scaling_factor": None})["routed_scaling_factor"] == 1.0
