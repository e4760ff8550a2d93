"""Keys that say something else than what a family computes are followed or refused, never ignored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moeserve import CheckpointError, MoELayer, load_config
from moeserve.checkpoints import layer_sources
from moeserve.checkpoints.architectures import named_family
from moeserve.checkpoints.claims import CLAIMS
from moeserve.checkpoints.families import FAMILIES, family_of
from tests.checkpoints.saved import config_of, language_model, rewritten, saved, second_layer, tensors_of
from tests.checkpoints.tiny_models import SETTINGS, answer_of, auto_class, moe_block, some_tokens, tiny_model
from tests.support.closeness import assert_close

#: as MiniMax-M2 was first published, besides its `model_type`
FIRST_PUBLISHED = {"scoring_func": "sigmoid", "use_routing_bias": True}


def changed_config(family: str, folder: Path, **changes: Any) -> Path:
    """The saved model with other keys about its language model."""
    text = config_of(family)
    language_model(text).update(changes)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(text))
    if not (folder / "model.safetensors").exists():
        (folder / "model.safetensors").symlink_to(saved(family) / "model.safetensors")
    return folder


def layer_source(family: str) -> Any:
    (source,) = layer_sources(load_config({"model": {"checkpoint": saved(family), "layers": [second_layer(family)]}}))
    return source


def other_values(agreeing: list[Any]) -> list[Any]:
    """Of the same kinds, none of which agrees."""
    if not agreeing:
        return [16]
    first = agreeing[0]
    if isinstance(first, bool):
        return [value for value in (True, False) if value not in agreeing]
    return ["some other"] if isinstance(first, str) else [first + 1]


@torch.inference_mode()
def their_answer(family: str, folder: Path) -> torch.Tensor:
    """By the model that transformers makes of the folder; what does not fit, such as a table of token ids, is in another layer."""
    return answer_of(moe_block(auto_class(family).from_pretrained(folder, ignore_mismatched_sizes=True).eval(), family), some_tokens(64))


@pytest.mark.parametrize("family", SETTINGS)
def test_each_key_that_says_something_else_is_refused_or_followed(family: str, tmp_path: Path) -> None:
    layer = MoELayer.from_checkpoint(saved(family), second_layer(family))
    source = layer_source(family)
    num_refused = 0
    for claim in CLAIMS:
        for key in claim.keys:
            for value in other_values(list(claim.agreeing(source))):
                folder = changed_config(family, tmp_path, **{key: value})
                if key in family_of(family).unrelated:
                    assert torch.equal(MoELayer.from_checkpoint(folder, second_layer(family))(some_tokens(64)), layer(some_tokens(64)))
                    continue
                try:
                    followed = MoELayer.from_checkpoint(folder, second_layer(family))
                except CheckpointError as error:
                    num_refused += 1
                    assert str(folder) in str(error)
                    assert key in str(error) or "tensor " in str(error), "the key, or what it makes of the tensors"
                else:
                    theirs = their_answer(family, folder)
                    assert_close(followed(some_tokens(64)), theirs)
    assert num_refused > 30


@pytest.mark.parametrize("family", SETTINGS)
def test_keys_that_say_what_the_layer_does_change_nothing(family: str, tmp_path: Path) -> None:
    source = layer_source(family)
    said = {key: claim.agreeing(source)[0] for claim in CLAIMS if claim.agreeing(source) for key in claim.keys}
    own = language_model(config_of(family))
    folder = changed_config(family, tmp_path, **{key: value for key, value in said.items() if key not in own})
    ours = MoELayer.from_checkpoint(folder, second_layer(family))(some_tokens(64))
    assert torch.equal(ours, MoELayer.from_checkpoint(saved(family), second_layer(family))(some_tokens(64)))


PUBLISHED = {
    "qwen3_moe": {"topk_method": "greedy", "n_group": 4, "topk_group": 2},
    "afmoe": {"score_func": "sigmoid", "route_norm": True, "n_group": 1, "topk_group": 1},
    "dots1": {"scoring_func": "noaux_tc", "topk_method": "noaux_tc"},
    "deepseek_v2": {"scoring_func": "softmax", "moe_layer_freq": 1, "ep_size": 1},
    "deepseek_v3": {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1},
    "ernie4_5_moe": {"moe_use_aux_free": True, "moe_gate": "topk", "moe_capacity": [64, 64, 64]},
    "gpt_oss": {"experts_per_token": 3, "hidden_act": "silu"},
    "hunyuan_v1_moe": {"moe_topk": [3, 3], "num_shared_expert": [1, 1], "norm_topk_prob": True, "group_limited_greedy": False},
    "longcat_flash": {"zero_expert_type": "identity", "router_bias": False, "topk_method": "noaux_tc"},
    "minimax_m2": {**FIRST_PUBLISHED, "shared_intermediate_size": 0, "shared_moe_mode": "sigmoid"},
    "granitemoehybrid": {"shared_intermediate_size": 40, "hidden_act": "silu"},
}


@pytest.mark.parametrize("family", PUBLISHED)
def test_keys_that_are_published_with_a_family(family: str, tmp_path: Path) -> None:
    """Which their classes in transformers do not know."""
    folder = changed_config(family, tmp_path, **PUBLISHED[family])
    ours = MoELayer.from_checkpoint(folder, second_layer(family))(some_tokens(64))
    assert torch.equal(ours, MoELayer.from_checkpoint(saved(family), second_layer(family))(some_tokens(64)))


@pytest.mark.parametrize("model_type", ["minimax", "mixtral", "qwen3_moe", "deepseek_v3"])
def test_a_model_is_served_as_the_class_it_wholly_is(model_type: str, tmp_path: Path) -> None:
    folder = rewritten(saved("minimax_m2"), tmp_path, tensors_of(saved("minimax_m2")), model_type=model_type, **FIRST_PUBLISHED)
    layer = MoELayer.from_checkpoint(folder, 1)
    theirs = answer_of(moe_block(tiny_model("minimax_m2"), "minimax_m2"), some_tokens(513))
    assert_close(layer(some_tokens(513)), theirs)
    assert layer.spec.gating.scoring_func == "sigmoid" and layer.router.score_correction_bias is not None


@pytest.mark.parametrize("architectures", [None, [], ["MiniMaxForCausalLM"], ["SomethingOfOurs"], "MiniMaxM2ForCausalLM"])
@pytest.mark.parametrize("keys", [FIRST_PUBLISHED, {}], ids=["keys", "tensors"])
def test_without_its_class_it_is_refused(keys: dict[str, Any], architectures: object, tmp_path: Path) -> None:
    folder = rewritten(
        saved("minimax_m2"), tmp_path, tensors_of(saved("minimax_m2")), model_type="minimax", architectures=architectures, **keys
    )
    with pytest.raises(CheckpointError) as caught:
        MoELayer.from_checkpoint(folder, 1)
    sentence = 'scoring_func is "sigmoid", but a minimax model' if keys else "block_sparse_moe.e_score_correction_bias"
    assert sentence in str(caught.value)


def test_a_class_that_the_folder_is_not_is_refused(tmp_path: Path) -> None:
    folder = rewritten(saved("mixtral"), tmp_path, tensors_of(saved("mixtral")), architectures=["Qwen2MoeForCausalLM"], norm_topk_prob=True)
    with pytest.raises(
        CheckpointError, match=r'read as qwen2_moe, because architectures is \["Qwen2MoeFor.*, though model_type is mixtral'
    ):
        MoELayer.from_checkpoint(folder)


def test_two_classes_that_the_folder_could_be(tmp_path: Path) -> None:
    """Without the bias nothing tells a MiniMax-M2 from a Mixtral, but their gates differ."""
    tensors = {name: tensor for name, tensor in tensors_of(saved("minimax_m2")).items() if "e_score" not in name}
    folder = rewritten(saved("minimax_m2"), tmp_path, tensors, model_type="mixtral")
    with pytest.raises(CheckpointError, match=r"model_type is mixtral, but architectures is .*, and the folder fits both"):
        MoELayer.from_checkpoint(folder)


def test_two_classes_that_compute_the_same(tmp_path: Path) -> None:
    folder = rewritten(saved("mellum"), tmp_path, tensors_of(saved("mellum")), architectures=["Qwen3MoeForCausalLM"], mlp_only_layers=[0])
    ours = MoELayer.from_checkpoint(folder)(some_tokens(64))
    assert torch.equal(ours, MoELayer.from_checkpoint(saved("mellum"))(some_tokens(64)))


# Mistral 4's is that of any Mistral in its wrapper.
@pytest.mark.parametrize("family", sorted(set(SETTINGS) - {"mistral4"}))
def test_classes_of_transformers_are_known(family: str) -> None:
    architectures = [type(tiny_model(family)).__name__]
    assert named_family({"architectures": architectures, "model_type": family}, FAMILIES) is None, "its own"
    named = named_family({"architectures": architectures, "model_type": "another"}, FAMILIES)
    assert named is not None and named.removesuffix("_text") == family.removesuffix("_text")


def test_a_name_of_a_class_that_is_a_book_is_none() -> None:
    """To match it would take hours, in which nothing else of the process runs."""
    assert named_family({"architectures": ["ForA" * 10**6 + "-"], "model_type": "another"}, FAMILIES) is None
