"""What some of the newer families have that others do not: tables of token ids, published names, lists with something for each layer.

T tokens, H hidden size.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moeserve import CheckpointError, Client, ConfigError, InvalidRequest, MoELayer, load_config
from moeserve.checkpoints import layer_sources
from tests.checkpoints.saved import rewritten, saved, tensors_of
from tests.checkpoints.tiny_models import moe_block, new_model, some_tokens, tiny_model
from tests.support.harness import ServiceHarness

HASHED, LEARNED = "model.layers.0.mlp", "model.layers.1.mlp"


def hash_block(hidden_states: Tensor, token_ids: Tensor) -> Tensor:
    block = dict(tiny_model("deepseek_v4").named_modules())[HASHED]
    with torch.inference_mode():
        answer: Tensor = block(hidden_states[None], input_ids=token_ids[None])
    return answer[0]


def some_ids(num_tokens: int) -> Tensor:
    return torch.randint(16, (num_tokens,), generator=torch.Generator().manual_seed(num_tokens))


@pytest.mark.parametrize("num_tokens", [1, 7, 64])
def test_a_table_of_token_ids(num_tokens: int) -> None:
    layer = MoELayer.from_checkpoint(saved("deepseek_v4"), HASHED)
    hidden_states, token_ids = some_tokens(num_tokens), some_ids(num_tokens)
    theirs = hash_block(hidden_states, token_ids)
    out = layer.run(hidden_states, token_ids=token_ids, return_routing=True)
    torch.testing.assert_close(out.hidden_states, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())
    table = dict(tiny_model("deepseek_v4").named_buffers())[f"{HASHED}.gate.tid2eid"]
    assert out.topk_ids is not None
    assert torch.equal(out.topk_ids.long(), table[token_ids])


def test_it_needs_ids_that_are_in_the_table() -> None:
    layer = MoELayer.from_checkpoint(saved("deepseek_v4"), HASHED)
    with pytest.raises(InvalidRequest, match=rf"token_ids is required: layer {re.escape(HASHED)} routes by the token id"):
        layer(some_tokens(3))
    with pytest.raises(InvalidRequest, match=r"token_ids has 16; this layer knows 0\.\.15"):
        layer.run(some_tokens(3), token_ids=torch.tensor([0, 16, 3]))
    unused = torch.tensor([True, False, True])
    assert layer.run(some_tokens(3), token_ids=torch.tensor([0, 16, 3]), used_token=unused).hidden_states[1].abs().max() == 0


@pytest.mark.parametrize("num_hosts", [1, 3])
def test_a_table_behind_hosts(num_hosts: int, tmp_path: Path) -> None:
    config = {"model": {"checkpoint": saved("deepseek_v4")}, "placement": {"num_hosts": num_hosts}}
    hidden_states, token_ids = some_tokens(9), some_ids(9)
    theirs = hash_block(hidden_states, token_ids)
    with ServiceHarness(config, "local", tmp_path) as service, Client(service.target) as client:
        ours = client.forward(hidden_states, layer=HASHED, token_ids=token_ids).hidden_states
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda table: table.masked_fill(table == 3, 2), r"allowed: distinct experts in 0\.\.7"),
        (lambda table: table + 1, r"allowed: distinct experts in 0\.\.7"),
        (lambda table: table[:, :2], r"has shape \[16, 2\], config\.json says \[16, 3\]"),
        (lambda table: table.float(), r"is stored as F32; allowed: whole numbers"),
    ],
)
def test_a_table_that_is_none(change: Any, sentence: str, tmp_path: Path) -> None:
    tensors = tensors_of(saved("deepseek_v4"))
    (name,) = [name for name in tensors if name.endswith("tid2eid")]
    folder = rewritten(saved("deepseek_v4"), tmp_path, tensors | {name: change(tensors[name])})
    with pytest.raises((CheckpointError, ConfigError), match=sentence):
        MoELayer.from_checkpoint(folder, 0)


def test_it_cannot_be_saved_or_made_of_a_seed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="its gate has a table of token ids, which a folder of moeserve cannot hold"):
        MoELayer.from_checkpoint(saved("deepseek_v4"), HASHED).save(tmp_path)
    layer = {"hidden_size": 8, "intermediate_size": 8, "num_experts": 2, "gating": {"routing": "token_table"}}
    with pytest.raises(ConfigError, match="needs a table of the experts of each token id, which only a checkpoint has"):
        layer_sources(load_config({"layers": [layer]}))[0].router()


def test_an_activation_of_the_shared_expert_alone_is_refused(tmp_path: Path) -> None:
    new_model("aria_text", hidden_act="gelu").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r'hidden_act is "gelu", but a aria_text model'):
        MoELayer.from_checkpoint(tmp_path, LEARNED)


PUBLISHED = {
    r"^model\.": "",
    r"\.mlp\.": ".ffn.",
    r"gate\.e_score_correction_bias": "gate.bias",
    r"gate_proj": "w1",
    r"down_proj": "w2",
    r"up_proj": "w3",
}


def published(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """DeepSeek-V4's own names."""
    names = {}
    for name, tensor in tensors.items():
        own = name
        for ours, theirs in PUBLISHED.items() if ".mlp." in name or ".ffn." in name else ():
            own = re.sub(ours, theirs, own)
        names[own] = tensor
    return names


def test_deepseek_v4_as_published(tmp_path: Path) -> None:
    tensors = published(tensors_of(saved("deepseek_v4")))
    assert {"layers.1.ffn.experts.7.w3.weight", "layers.1.ffn.shared_experts.w1.weight", "layers.0.ffn.gate.tid2eid"} <= set(tensors)
    folder = rewritten(saved("deepseek_v4"), tmp_path, tensors, num_hash_layers=1, mlp_layer_types=None)
    for layer in (HASHED, LEARNED):
        ours, theirs = (MoELayer.from_checkpoint(each, layer) for each in (folder, saved("deepseek_v4")))
        assert ours.spec == theirs.spec
        token_ids = some_ids(9)
        assert torch.equal(*(each.run(some_tokens(9), token_ids=token_ids).hidden_states for each in (ours, theirs)))


@pytest.mark.parametrize("changes", [{"hybrid_override_pattern": "*E", "layers_block_type": None}, {"num_hidden_layers": 5}])
def test_nemotron_as_published(changes: dict[str, Any], tmp_path: Path) -> None:
    tensors = {name.replace("model.", "backbone.", 1): tensor for name, tensor in tensors_of(saved("nemotron_h")).items()}
    folder = rewritten(saved("nemotron_h"), tmp_path, tensors, **changes)
    assert torch.equal(*(MoELayer.from_checkpoint(each)(some_tokens(9)) for each in (folder, saved("nemotron_h"))))


def test_layers_of_step_may_have_no_limit(tmp_path: Path) -> None:
    text = json.loads((saved("step3p5") / "config.json").read_text())["text_config"]
    without = text | {"swiglu_limits": None, "swiglu_limits_shared": None}
    folders = [
        rewritten(saved("step3p5"), tmp_path / name, tensors_of(saved("step3p5")), text_config=each)
        for name, each in (("with", text), ("without", without))
    ]
    told = [MoELayer.from_checkpoint(folder) for folder in folders]
    assert [layer.spec.activation for layer in told] == ["swiglu_post(0.7)", "swiglu"]
    assert not torch.equal(told[0](some_tokens(9)), told[1](some_tokens(9)))


@pytest.mark.parametrize("enum", ["1", [1], "1,2,3"])
def test_which_layers_of_step(enum: Any, tmp_path: Path) -> None:
    text = json.loads((saved("step3p5") / "config.json").read_text())["text_config"]
    changed = text | {"moe_layers_enum": enum, "mlp_layer_types": None}
    folder = rewritten(saved("step3p5"), tmp_path, tensors_of(saved("step3p5")), text_config=changed)
    assert [source.spec.name for source in layer_sources(load_config(folder))] == ["model.layers.1.mlp"]


def test_cohere2_with_a_sum(tmp_path: Path) -> None:
    """The other way to add the shared expert, and the other score."""
    changes = {"shared_expert_combination_strategy": "sum", "expert_selection_fn": "sigmoid"}
    model = new_model("cohere2_moe", **changes)
    model.save_pretrained(tmp_path)
    hidden_states = some_tokens(33)
    with torch.inference_mode():
        theirs = moe_block(model, "cohere2_moe")(hidden_states[None])[0]
    ours = MoELayer.from_checkpoint(tmp_path, LEARNED)(hidden_states)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())
