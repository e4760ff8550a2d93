"""What config.json and the index say of formats decides the plan, before anything is downloaded, and loading agrees with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moeserve import CheckpointError, MoELayer, load_config
from moeserve.checkpoints import layer_sources
from moeserve.cli.app import main
from tests.checkpoints.published import PUBLISHED, compressed, fp8_scaled, gptq, nvfp4_modelopt
from tests.checkpoints.test_stored_types import CONFIG, EXPERTS, LAYER, SIZE, gates
from tests.checkpoints_on_disk import write_folder

KINDS = ("gate", "up", "down")


def weights(write: Any, experts: range = range(EXPERTS)) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of experts, and the numbers of each weight."""
    generator, stored, numbers = torch.Generator().manual_seed(1), {}, {}
    for module in (f"{LAYER}.experts.{expert}.{kind}_proj" for expert in experts for kind in KINDS):
        tensors, numbers[module] = write(module, (SIZE, SIZE), generator)
        stored |= tensors
    return stored, numbers


def plain(module: str, shape: tuple[int, int], generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    weight = torch.randn(shape, generator=generator)
    return {f"{module}.weight": weight}, weight


def folder_of(folder: Path, settings: Mapping[str, Any] | None, tensors: Mapping[str, Tensor], **config: object) -> Path:
    quantized = {} if settings is None else {"quantization_config": settings}
    return write_folder(folder, {**CONFIG, **quantized, **config}, {**gates(), **tensors})


def before_download(folder: Path) -> Path:
    """config.json and the index alone, as they come first."""
    single = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(load_file(single), "model-00001-of-00001.safetensors")}))
    single.rename(folder / "model-00001-of-00001.safetensors.part")
    return folder


def downloaded(folder: Path) -> Path:
    (folder / "model-00001-of-00001.safetensors.part").rename(folder / "model-00001-of-00001.safetensors")
    return folder


def check_held(folder: Path, numbers: Mapping[str, Tensor]) -> None:
    for number, expert in enumerate(MoELayer.from_checkpoint(folder, dtype=torch.float32).bank.experts):
        gate, up, down = (numbers[f"{LAYER}.experts.{number}.{kind}_proj"] for kind in KINDS)
        torch.testing.assert_close(expert.gate_up_proj, torch.cat([gate, up]), rtol=1e-6, atol=0)
        torch.testing.assert_close(expert.down_proj, down, rtol=1e-6, atol=0)


@pytest.mark.parametrize("title", PUBLISHED)
def test_what_is_served_is_planned_before_the_download(title: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    published = PUBLISHED[title]
    tensors, numbers = weights(published.write)
    before_download(folder_of(tmp_path, published.quantization_config, tensors))
    config = json.loads((tmp_path / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["plan", str(tmp_path)]) == 0
    # Held in bfloat16, which is what numbers in few bits become when nothing else is asked for.
    assert f"{EXPERTS * 3 * SIZE * SIZE * 2 / 2**20:.1f} MiB" in capsys.readouterr().out
    check_held(downloaded(tmp_path), numbers)


def test_gpt_oss_is_planned_before_the_download(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [
        "router.weight",
        "router.bias",
        *(f"experts.{part}_proj_{kind}" for part in ("gate_up", "down") for kind in ("blocks", "scales", "bias")),
    ]
    config = {"model_type": "gpt_oss", "num_hidden_layers": 2, "hidden_size": 2880, "intermediate_size": 2880, "num_local_experts": 32}
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "num_experts_per_tok": 4, "quantization_config": {"quant_method": "mxfp4"}})
    )
    weight_map = {f"model.layers.{layer}.mlp.{name}": "model-00001-of-00002.safetensors" for layer in range(2) for name in names}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert main(["plan", str(tmp_path), "--num-hosts", "4", "--address", "10.0.0.1:6379"]) == 0
    assert f"{2 * 8 * (3 * 2880 + 3) * 2880 * 2 / 2**20:.1f} MiB" in capsys.readouterr().out


def test_plain_weights_of_a_type_that_nobody_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before_download(folder_of(tmp_path, None, weights(plain)[0], dtype=None))
    assert main(["plan", str(tmp_path)]) == 2
    assert "is not there yet, and config.json names no dtype: set model.dtype" in capsys.readouterr().err
    assert main(["plan", str(tmp_path), "--dtype", "bfloat16"]) == 0


FP8 = {"quant_method": "fp8", "weight_block_size": [32, 32]}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
PACKED = compressed("W4A16", "pack-quantized", group_size=32)
GROUP = PACKED.quantization_config["config_groups"]["group_0"]


def packed_as(**weights: object) -> dict[str, Any]:
    return {**PACKED.quantization_config, "config_groups": {"group_0": {**GROUP, "weights": {**GROUP["weights"], **weights}}}}


REFUSED: dict[str, tuple[Any, str]] = {
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quant_method is 'bitsandbytes'; supported: fp8, "),
    "another method": ({"quant_method": "hqq"}, "quant_method is 'hqq'; supported: "),
    "no method": ({"bits": 4}, "quant_method is None; supported: "),
    "no table": ("fp8", "quantization_config is 'fp8'; allowed: a table"),
    "a method of another kind": ({"quant_method": ["fp8"]}, "quant_method is "),
    "fp8 scales of another kind": ({**FP8, "scale_fmt": "ue4m3"}, "scale_fmt is 'ue4m3'; allowed: 'float' or 'ue8m0'"),
    "fp8 experts of another kind": ({**FP8, "expert_dtype": "int4"}, "expert_dtype is 'int4'; allowed: 'fp8' or 'fp4'"),
    "gptq, 3 bits": ({**GPTQ, "bits": 3}, "bits is 3; supported for gptq: 2, 4, 8"),
    "gptq, no bits": ({"quant_method": "gptq", "group_size": 32}, "quantization_config.bits is None; allowed: a positive whole number"),
    "gptq, marlin": ({**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'; supported: gptq, gptq_v2"),
    "gptq, rotated": ({**GPTQ, "rotation": "hadamard"}, "rotation is 'hadamard'; supported: none"),
    "gptq, groups of none": ({**GPTQ, "group_size": 0}, "group_size is 0; allowed: a positive whole number"),
    "gptq, a rule that is none": ({**GPTQ, "dynamic": {"+:(": {}}}, "dynamic has the pattern "),
    "awq, gemv": ({**AWQ, "version": "gemv"}, "version is 'gemv'; supported for awq: 'gemm'"),
    "awq, 8 bits": ({**AWQ, "bits": 8}, "bits is 8; supported for awq: 4"),
    "awq, no zeros": ({**AWQ, "zero_point": False}, "zero_point is False; supported for awq: True"),
    "compressed-tensors, 2:4": ({**PACKED.quantization_config, "format": "marlin-24", "config_groups": {"a": {**GROUP, "format": None}}}, "marlin-24"),
    "compressed-tensors, sparse": ({**PACKED.quantization_config, "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config is "),
    "compressed-tensors, rotated": ({**PACKED.quantization_config, "transform_config": {"config_groups": {"a": {}}}}, "transform_config is "),
    "compressed-tensors, not yet": ({**PACKED.quantization_config, "quantization_status": "frozen"}, "quantization_status is 'frozen'"),
    "compressed-tensors, 3 bits": (packed_as(num_bits=3), "int with 3 bits? *; supported in this format: int with 2, 4, 8|with 3 bits"),
    "compressed-tensors, no groups": ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "config_groups is not a table"),
    "modelopt, another": ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "quant_algo is 'W4A8_AWQ'; supported: FP8, "),
}  # fmt: skip


@pytest.mark.parametrize("title", REFUSED)
def test_what_is_refused_is_not_planned(title: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings, sentence = REFUSED[title]
    folder_of(tmp_path, settings, weights(plain)[0])
    with pytest.raises(CheckpointError, match=rf"config\.json: .*({sentence})"):
        MoELayer.from_checkpoint(tmp_path)
    assert main(["plan", str(tmp_path)]) == 2
    assert "config.json: " in capsys.readouterr().err


#: settings, tensors, and what the message says
CONTRADICTIONS: dict[str, tuple[Mapping[str, Any] | None, dict[str, Tensor], str]] = {
    "nothing says that weights are packed": (None, weights(gptq())[0], r"up_proj\.qweight, but .* does not say how|qweight, but"),
    "nothing says what scales are": (None, weights(fp8_scaled("weight_scale", (1, 10**6)))[0], r"weight_scale, but config\.json without"),
    "weights as they are": (FP8, weights(plain)[0], r"fp8 says that .*weight is stored in few bits, but the index has no scales of it"),
    "packed weights as they are": (GPTQ, weights(plain)[0], "gptq says that .* is stored in few bits"),
    "no zeros": (GPTQ, {k: v for k, v in weights(gptq())[0].items() if "qzeros" not in k}, r"tensor .*\.qzeros is missing"),
    "no second scale": (
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        {k: v for k, v in weights(nvfp4_modelopt)[0].items() if "scale_2" not in k},
        r"weight_scale_2 is missing",
    ),
    "ignored, but packed": ({**PACKED.quantization_config, "ignore": ["re:.*experts.*"]}, weights(PACKED.write)[0], "_packed, but compressed-tensors"),
    "scaled inputs": (
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        weights(nvfp4_modelopt)[0] | {f"{LAYER}.experts.0.gate_proj.pre_quant_scale": torch.ones(SIZE)},
        "pre_quant_scale, which multiplies what goes into",
    ),
}  # fmt: skip


@pytest.mark.parametrize("title", CONTRADICTIONS)
def test_an_index_that_contradicts_config_json(title: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings, tensors, sentence = CONTRADICTIONS[title]
    before_download(folder_of(tmp_path, settings, tensors))
    with pytest.raises(CheckpointError, match=sentence):
        layer_sources(load_config(tmp_path))
    assert main(["plan", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err


def halves(first: Any, second: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Experts 0 and 1 written in one way, the rest in another."""
    (stored, numbers), (others, more) = weights(first, range(2)), weights(second, range(2, EXPERTS))
    return stored | others, numbers | more


EIGHT = compressed("W8A16", "pack-quantized", group_size=32)
MIXED: dict[str, tuple[Mapping[str, Any], tuple[dict[str, Tensor], dict[str, Tensor]]]] = {
    "modules_to_not_convert": ({**FP8, "modules_to_not_convert": [f"{LAYER}.experts.0", f"{LAYER}.experts.1", "lm_head"]}, halves(plain, fp8_scaled("weight_scale_inv", (32, 32)))),
    "awq, modules_to_not_convert": ({**AWQ, "modules_to_not_convert": ["experts.0", "experts.1"]}, halves(plain, PUBLISHED["awq"].write)),
    "gptq, dynamic": ({**GPTQ, "dynamic": {r"-:.*experts\.0\..*": {}, r"+:.*experts\.1\..*": {"bits": 8, "group_size": -1}}},
        tuple(a | b | c for a, b, c in zip(weights(plain, range(1)), weights(gptq(8, -1), range(1, 2)), weights(gptq(), range(2, EXPERTS)), strict=True))),
    "compressed-tensors, ignore": ({**PACKED.quantization_config, "ignore": [r"re:.*experts\.[01]\..*", "lm_head"]}, halves(plain, PACKED.write)),
    "compressed-tensors, groups": (
        {**PACKED.quantization_config, "config_groups": {"all": GROUP, "some": {**EIGHT.quantization_config["config_groups"]["group_0"], "targets": [r"re:.*experts\.[01]\..*"]}}},
        halves(EIGHT.write, PACKED.write),
    ),
    "compressed-tensors, a format for each group": (
        {"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": {
            "some": {**PUBLISHED["compressed-tensors NVFP4"].quantization_config["config_groups"]["group_0"], "targets": [f"{LAYER}.experts.{expert}.{kind}_proj" for expert in range(2) for kind in KINDS]},
            "all": PUBLISHED["compressed-tensors FP8 by channel"].quantization_config["config_groups"]["group_0"]}},
        halves(PUBLISHED["compressed-tensors NVFP4"].write, PUBLISHED["compressed-tensors FP8 by channel"].write),
    ),
    "modelopt, quantized_layers": (
        {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": {f"{LAYER}.experts.{expert}": {"quant_algo": "NVFP4"} for expert in range(2)} | {f"{LAYER}.experts.{expert}.{kind}_proj": {"quant_algo": "FP8"} for expert in range(2, EXPERTS) for kind in KINDS}},
        halves(nvfp4_modelopt, PUBLISHED["modelopt FP8"].write),
    ),
}  # fmt: skip


@pytest.mark.parametrize("title", MIXED)
def test_several_formats_in_one_layer(title: str, tmp_path: Path) -> None:
    settings, (tensors, numbers) = MIXED[title]
    check_held(folder_of(tmp_path, settings, tensors), numbers)


BESIDE = {
    "quantize_config.json": ({"bits": 4, "group_size": 32, "desc_act": False, "sym": False}, "gptq, asymmetric"),
    "quant_config.json": ({"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}, "awq"),
    "hf_quant_config.json": (
        {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]}},
        "modelopt NVFP4",
    ),
}


@pytest.mark.parametrize("file", BESIDE)
def test_settings_in_a_file_of_their_own(file: str, tmp_path: Path) -> None:
    settings, title = BESIDE[file]
    tensors, numbers = weights(PUBLISHED[title].write)
    folder_of(tmp_path, None, tensors)
    (tmp_path / file).write_text(json.dumps(settings))
    check_held(tmp_path, numbers)
    (tmp_path / file).write_text(json.dumps({}))
    with pytest.raises(CheckpointError, match=rf"{file}: "):
        MoELayer.from_checkpoint(tmp_path)


def test_settings_in_the_table_of_the_language_model(tmp_path: Path) -> None:
    tensors, numbers = weights(PACKED.write)
    folder_of(tmp_path, None, tensors, text_config={"quantization_config": PACKED.quantization_config})
    check_held(tmp_path, numbers)


def test_biases_that_autogptq_adds_must_be_zero(tmp_path: Path) -> None:
    tensors, numbers = weights(gptq())
    tensors |= {f"{module}.bias": torch.zeros(SIZE, dtype=torch.float16) for module in numbers}
    check_held(folder_of(tmp_path, GPTQ, tensors), numbers)
    name = f"{LAYER}.experts.2.down_proj.bias"
    save_file({**load_file(tmp_path / "model.safetensors"), name: torch.ones(SIZE)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"tensor {name} is not zero, but experts of this model have no biases"):
        MoELayer.from_checkpoint(tmp_path)


@pytest.mark.parametrize("group", [-1, 2])
def test_groups_that_do_not_exist(group: int, tmp_path: Path) -> None:
    tensors, _ = weights(gptq())
    name = f"{LAYER}.experts.1.up_proj.g_idx"
    tensors[name] = torch.full((SIZE,), group, dtype=torch.int32)
    with pytest.raises(CheckpointError, match=name):
        MoELayer.from_checkpoint(folder_of(tmp_path, GPTQ, tensors))


def test_sizes_that_no_words_hold(tmp_path: Path) -> None:
    tensors, _ = weights(gptq())
    with pytest.raises(CheckpointError, match=r"up_proj\.weight is 60 x 64, but GPTQ int4 packs 8 numbers in a word|gate_proj"):
        MoELayer.from_checkpoint(folder_of(tmp_path, GPTQ, tensors, moe_intermediate_size=60))
