"""Layers out of a folder against the model of transformers that wrote it, in every layout that is in use.

T tokens, H hidden size.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moeserve import MoELayer, load_config
from moeserve.checkpoints import layer_sources
from tests.support.checkpoints_on_disk import (
    FAMILIES,
    HIDDEN_SIZE,
    INTERMEDIATE_SIZE,
    LAYOUTS,
    NUM_EXPERTS,
    moe_blocks,
    random_model,
)
from tests.support.closeness import assert_close
from tests.support.stacked import stacked


def some_tokens(num_tokens: int, hidden_size: int = HIDDEN_SIZE) -> Tensor:
    return torch.randn(num_tokens, hidden_size, generator=torch.Generator().manual_seed(num_tokens))


def assert_equal_layers(model: object, folder: Path, tokens: tuple[int, ...]) -> None:
    for name, block in moe_blocks(model).items():
        layer = MoELayer.from_checkpoint(folder, name)
        for num_tokens in tokens:
            hidden_states = some_tokens(num_tokens)
            with torch.inference_mode():
                # Blocks of transformers cannot be asked for no tokens at all.
                expected = block(hidden_states[None])[0] if num_tokens else hidden_states
            assert_close(layer(hidden_states), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_equal_those_of_transformers(family: str, layout: str, tmp_path: Path) -> None:
    model = random_model(family)
    LAYOUTS[layout](model, tmp_path)
    assert_equal_layers(model, tmp_path, tokens=(0, 1, 3, 64, 1000) if family == "mixtral" else (3, 64))


@pytest.mark.parametrize("changes", [{"norm_topk_prob": True}, {"norm_topk_prob": False}, {"num_experts_per_tok": 1}], ids=str)
@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe"])
def test_settings_of_the_family_are_honoured(family: str, changes: dict[str, object], tmp_path: Path) -> None:
    model = random_model(family, **changes)
    model.save_pretrained(tmp_path)
    assert_equal_layers(model, tmp_path, tokens=(64,))


@pytest.mark.parametrize("key", ["num_experts", "num_local_experts"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_number_of_experts_goes_by_either_name(family: str, key: str, tmp_path: Path) -> None:
    random_model(family).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("num_experts", "num_local_experts"):
        config.pop(name, None)
    (tmp_path / "config.json").write_text(json.dumps(config | {key: NUM_EXPERTS}))
    assert MoELayer.from_checkpoint(tmp_path).spec.num_experts == NUM_EXPERTS


@pytest.mark.parametrize("family", FAMILIES)
def test_gelu_is_the_exact_one(family: str, tmp_path: Path) -> None:
    model = random_model(family, hidden_act="gelu")
    model.save_pretrained(tmp_path)
    assert_equal_layers(model, tmp_path, tokens=(64,))


@pytest.mark.parametrize("family", FAMILIES)
def test_served_layers_are_the_moe_layers_in_model_order(family: str, tmp_path: Path) -> None:
    random_model(family).save_pretrained(tmp_path)
    specs = [source.spec for source in layer_sources(load_config(tmp_path))]
    indexes = [1] if family == "qwen3_moe" else [0, 1, 2, 3]
    assert [spec.name for spec in specs] == [f"model.layers.{index}.mlp" for index in indexes]
    assert [spec.name for spec in specs] == list(moe_blocks(random_model(family)))
    assert {(spec.hidden_size, spec.intermediate_size, spec.num_experts) for spec in specs} == {
        (HIDDEN_SIZE, INTERMEDIATE_SIZE, NUM_EXPERTS)
    }


def test_the_shipped_model_on_real_hidden_states(tiny_moe: Path) -> None:
    """All layers, on what really reaches them when the model reads its own vocabulary."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_moe, dtype=torch.float32)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for name, block in moe_blocks(model).items():
        block.register_forward_hook(lambda module, args, out, name=name: seen.update({name: (args[0][0], out[0])}))
    with torch.inference_mode():
        model(torch.randperm(2048, generator=torch.Generator().manual_seed(0))[None, :256])
    assert list(seen) == [f"model.layers.{index}.mlp" for index in range(4)]
    for index, (hidden_states, expected) in enumerate(seen.values()):
        assert_close(MoELayer.from_checkpoint(tiny_moe, index, dtype=torch.float32)(hidden_states), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_weights_keep_their_type_unless_told_otherwise(dtype: torch.dtype, tiny_moe: Path) -> None:
    assert MoELayer.from_checkpoint(tiny_moe).bank.dtype == torch.bfloat16
    cast = MoELayer.from_checkpoint(tiny_moe, dtype=dtype)
    assert cast.bank.dtype == dtype
    assert cast.router.gate.dtype == torch.float32
    # bfloat16 -> float16 loses the smallest values only, of which it has every multiple of 2^-24.
    stored = stacked(MoELayer.from_checkpoint(tiny_moe).bank.experts)
    assert (stacked(cast.bank.experts).gate_up_proj.float() - stored.gate_up_proj.float()).abs().max() <= 2**-25
