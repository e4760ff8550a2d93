"""Every way a folder can be broken is one sentence that names the file, the tensor or the key."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from moeserve import CheckpointError, MoELayer
from moeserve.checkpoints.families import FAMILIES
from tests.support.checkpoints_on_disk import CONFIG, MLP, expert_tensors, layer_tensors, write_folder

UP = f"{MLP}.experts.2.up_proj.weight"


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        MoELayer.from_checkpoint(folder, **options)
    sentence = str(caught.value)
    assert str(folder) in sentence
    assert "\n" not in sentence
    return sentence


def changed(name: str, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    tensors = layer_tensors()
    return tensors | {name: change(tensors[name]).contiguous()}


def test_the_folder_these_tests_break_is_whole(tmp_path: Path) -> None:
    layer = MoELayer.from_checkpoint(write_folder(tmp_path, CONFIG, layer_tensors()))
    assert (layer.spec.hidden_size, layer.spec.intermediate_size, layer.spec.num_experts) == (8, 6, 4)


def test_no_weights_at_all(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(dict(CONFIG)))
    assert "has neither model.safetensors nor model.safetensors.index.json" in refusal(tmp_path)


def test_a_truncated_file(tmp_path: Path) -> None:
    path = write_folder(tmp_path, CONFIG, layer_tensors()) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert f"{path} is not a complete safetensors file" in refusal(tmp_path)


@pytest.mark.parametrize("garbage", [b"", b"\xff" * 8, b"\x10" + b"\0" * 7 + b"not a json header"], ids=["empty", "length", "json"])
def test_a_corrupted_header(tmp_path: Path, garbage: bytes) -> None:
    path = write_folder(tmp_path, CONFIG, layer_tensors()) / "model.safetensors"
    path.write_bytes(garbage + path.read_bytes()[len(garbage) :] if garbage else b"")
    assert f"{path} is not a complete safetensors file" in refusal(tmp_path)


@pytest.mark.parametrize("name", [f"{MLP}.gate.weight", f"{MLP}.experts.0.gate_proj.weight", UP])
def test_a_missing_tensor(tmp_path: Path, name: str) -> None:
    tensors = layer_tensors()
    del tensors[name]
    sentence = refusal(write_folder(tmp_path, CONFIG, tensors))
    assert name in sentence
    assert "is missing" in sentence


def test_a_missing_shard(tmp_path: Path) -> None:
    rest = {name: tensor for name, tensor in layer_tensors().items() if name not in expert_tensors(3)}
    shard = write_folder(tmp_path, CONFIG, rest, expert_tensors(3)) / "model-00002-of-00002.safetensors"
    shard.unlink()
    assert f"{shard} is missing, but model.safetensors.index.json names it" in refusal(tmp_path)


@pytest.mark.parametrize("expert", [0, 3])
def test_an_index_that_promises_a_tensor_its_shard_does_not_hold(tmp_path: Path, expert: int) -> None:
    rest = {name: tensor for name, tensor in layer_tensors().items() if name not in expert_tensors(expert)}
    shard = write_folder(tmp_path, CONFIG, rest, expert_tensors(expert)) / "model-00002-of-00002.safetensors"
    save_file({"other": torch.zeros(1)}, shard)
    sentence = refusal(tmp_path)
    assert f"{shard}: tensor {MLP}.experts.{expert}." in sentence
    assert "is missing, but model.safetensors.index.json says it is there" in sentence


@pytest.mark.parametrize("weight_map", [None, [], {"a": 1}])
def test_an_index_without_a_map(tmp_path: Path, weight_map: object) -> None:
    path = write_folder(tmp_path, CONFIG, layer_tensors()) / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": weight_map}))
    assert f"{path} has no weight_map" in refusal(tmp_path)


@pytest.mark.parametrize("file", ["../a.safetensors", "a\0.safetensors", "\ud800.safetensors", "a\n.safetensors", "a.bin", ""], ids=ascii)
def test_an_index_of_files_that_cannot_be_in_the_folder(tmp_path: Path, file: str) -> None:
    path = write_folder(tmp_path, CONFIG, layer_tensors()) / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": dict.fromkeys(layer_tensors(), file)}))
    assert f"{path} names the file {file!r}; allowed: safetensors files in the same folder" in refusal(tmp_path)


@pytest.mark.parametrize("name", [f"{MLP}.gate.weight", UP])
def test_a_wrong_shape(tmp_path: Path, name: str) -> None:
    sentence = refusal(write_folder(tmp_path, CONFIG, changed(name, lambda tensor: tensor[:, 1:])))
    rows = len(layer_tensors()[name])
    assert f"{tmp_path}/model.safetensors: tensor {name} has shape [{rows}, 7], config.json says [{rows}, 8]" in sentence


@pytest.mark.parametrize("shape", [(3, 12, 8), (12, 8), ()], ids=str)
def test_a_wrong_stack(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensors = {f"{MLP}.experts.gate_up_proj": torch.zeros(shape), f"{MLP}.experts.down_proj": torch.zeros(4, 8, 6)}
    write_folder(tmp_path, CONFIG, tensors | {f"{MLP}.gate.weight": torch.zeros(4, 8)})
    sentence = refusal(tmp_path)
    assert f"tensor {MLP}.experts.gate_up_proj has shape {list(shape)}, config.json says [4, 12, 8]" in sentence


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [f"{MLP}.gate.weight", UP])
def test_weights_that_are_not_finite(tmp_path: Path, name: str, value: float) -> None:
    def spoil(tensor: Tensor) -> Tensor:
        tensor[-1, -1] = value
        return tensor

    assert f"tensor {name} holds NaN or Inf" in refusal(write_folder(tmp_path, CONFIG, changed(name, spoil)))


def test_weights_that_do_not_fit_the_type_they_are_cast_to(tmp_path: Path) -> None:
    write_folder(tmp_path, CONFIG, changed(UP, lambda tensor: tensor * 1e6))
    assert f"tensor {UP} holds NaN or Inf as float16" in refusal(tmp_path, dtype=torch.float16)


@pytest.mark.parametrize("dtype", [None, torch.float32])
@pytest.mark.parametrize(("stored", "called"), [(torch.int8, "I8"), (torch.float64, "F64"), (torch.float8_e4m3fn, "F8_E4M3")], ids=str)
def test_weights_of_another_type(tmp_path: Path, stored: torch.dtype, called: str, dtype: torch.dtype | None) -> None:
    write_folder(tmp_path, CONFIG, changed(UP, lambda tensor: tensor.to(stored)))
    assert f"tensor {UP} is stored as {called}; supported: F32, F16, BF16" in refusal(tmp_path, dtype=dtype)


@pytest.mark.parametrize("text", ["", "{", "[]", "\udcff"], ids=["empty", "half", "list", "not utf-8"])
def test_a_config_that_is_no_json_object(tmp_path: Path, text: str) -> None:
    path = write_folder(tmp_path, CONFIG, layer_tensors()) / "config.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    assert str(path) in refusal(tmp_path)


def test_a_missing_config(tmp_path: Path) -> None:
    path = write_folder(tmp_path, CONFIG, layer_tensors()) / "config.json"
    path.unlink()
    assert f"{path} cannot be read" in refusal(tmp_path)


@pytest.mark.parametrize("model_type", ["llama", "", None])
def test_an_unknown_kind_of_model(tmp_path: Path, model_type: object) -> None:
    write_folder(tmp_path, {**CONFIG, "model_type": model_type, "hidden_act": "tanh"}, layer_tensors())
    told = f"config.json: model_type is {model_type}, which is not known, and no known family has its keys and tensors"
    assert f"{told}; supported: {', '.join(sorted(FAMILIES))}" in refusal(tmp_path)


SIZES = ["num_hidden_layers", "hidden_size", "intermediate_size", "num_local_experts", "num_experts_per_tok"]


@pytest.mark.parametrize("key", SIZES)
def test_a_missing_key(tmp_path: Path, key: str) -> None:
    write_folder(tmp_path, {name: value for name, value in CONFIG.items() if name != key}, layer_tensors())
    assert f"config.json: {key} must be a positive whole number, but is missing" in refusal(tmp_path)


@pytest.mark.parametrize("value", [0, -1, "8", 8.0, None, True])
@pytest.mark.parametrize("key", SIZES)
def test_a_size_that_is_none(tmp_path: Path, key: str, value: object) -> None:
    write_folder(tmp_path, {**CONFIG, key: value}, layer_tensors())
    assert f"config.json: {key} must be a positive whole number, but is {json.dumps(value)}" in refusal(tmp_path)


@pytest.mark.parametrize("hidden_act", ["gelu_new", "relu", None])
def test_an_unsupported_activation(tmp_path: Path, hidden_act: object) -> None:
    write_folder(tmp_path, {**CONFIG, "hidden_act": hidden_act}, layer_tensors())
    assert f"config.json: hidden_act must be one of silu, swish, gelu, gelu_pytorch_tanh, but is {json.dumps(hidden_act)}" in refusal(
        tmp_path
    )


def test_a_model_without_moe_layers(tmp_path: Path) -> None:
    config = {**CONFIG, "model_type": "qwen3_moe", "num_experts": 4, "moe_intermediate_size": 6, "mlp_only_layers": [0]}
    write_folder(tmp_path, config, layer_tensors())
    assert "config.json: none of the layers is an MoE layer" in refusal(tmp_path)
