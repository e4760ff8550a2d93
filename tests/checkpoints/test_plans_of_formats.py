"""What config.json and the index say of formats decides the plan, before anything is downloaded, and loading agrees with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moeserve import CheckpointError, MoELayer, load_config
from moeserve.checkpoints import bank_bytes, layer_sources, load_bank
from moeserve.cli.app import main
from moeserve.experts import ExpertShard
from tests.checkpoints.published import PUBLISHED, Stored, Writer, fp8_scaled, gptq, nvfp4_modelopt
from tests.checkpoints.quantized_folders import (
    AWQ,
    EXPERTS,
    FP8,
    GPTQ,
    LAYER,
    NVFP4,
    PACKED,
    SIZE,
    check_held,
    folder_of,
    packed_as,
    plain,
    weights,
)


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


@pytest.mark.parametrize("title", PUBLISHED)
def test_what_is_served_is_planned_before_the_download(title: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    published = PUBLISHED[title]
    tensors, numbers = weights(published.write)
    before_download(folder_of(tmp_path, published.quantization_config, tensors))
    config = json.loads((tmp_path / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["plan", str(tmp_path), "--quantization", "none"]) == 0
    # In bfloat16, which is what numbers in few bits become when nothing else is asked for.
    assert f"{EXPERTS * 3 * SIZE * SIZE * 2 / 2**20:.1f} MiB" in capsys.readouterr().out
    everyone = [ExpertShard(expert) for expert in range(EXPERTS)]
    planned = bank_bytes(layer_sources(load_config(tmp_path))[0], everyone)
    check_held(downloaded(tmp_path), numbers)
    held = load_bank(layer_sources(load_config(tmp_path))[0], everyone).nbytes
    # Headers say of which type scales are, and the file whether columns are in another order: in so small a weight that is much.
    assert 0.8 * held <= planned < 1.2 * held


def test_gpt_oss_is_planned_before_the_download(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experts = [f"experts.{part}_proj_{kind}" for part in ("gate_up", "down") for kind in ("blocks", "scales", "bias")]
    names = ["router.weight", "router.bias", *experts]
    config = {"model_type": "gpt_oss", "num_hidden_layers": 2, "hidden_size": 2880, "intermediate_size": 2880, "num_local_experts": 32}
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "num_experts_per_tok": 4, "quantization_config": {"quant_method": "mxfp4"}})
    )
    weight_map = {f"model.layers.{layer}.mlp.{name}": "model-00001-of-00002.safetensors" for layer in range(2) for name in names}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert main(["plan", str(tmp_path), "--num-hosts", "4", "--address", "10.0.0.1:6379"]) == 0
    out = capsys.readouterr().out
    assert "swigluoai MXFP4" in out
    # 16 bytes and an exponent for 32 numbers; biases in bfloat16.
    assert f"{2 * 8 * (3 * 2880 * 2880 * 17 / 32 + 3 * 2880 * 2) / 2**20:.1f} MiB" in out


def test_plain_weights_of_a_type_that_nobody_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before_download(folder_of(tmp_path, None, weights(plain)[0], dtype=None))
    assert main(["plan", str(tmp_path)]) == 2
    assert "is not there yet, and config.json names no dtype: set model.dtype" in capsys.readouterr().err
    assert main(["plan", str(tmp_path), "--dtype", "bfloat16"]) == 0


BLOCKS = {"a": {"targets": ["Linear"], "weights": {"num_bits": 8, "strategy": "block", "block_structure": f"{2**63}x1"}}}
NO_FORMAT = {"a": {"targets": ["Linear"], "weights": {"num_bits": 4}}}
PACKED_SETTINGS = PACKED.quantization_config

#: settings, and what the message says
REFUSED: dict[str, tuple[object, str]] = {
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quant_method is 'bitsandbytes'; supported: fp8, "),
    "another method": ({"quant_method": "hqq"}, "quant_method is 'hqq'; supported: "),
    "no method": ({"bits": 4}, "quant_method is None; supported: "),
    "no table": ("fp8", "quantization_config is 'fp8'; allowed: a table"),
    "a method of another kind": ({"quant_method": ["fp8"]}, "quant_method is "),
    "fp8 scales of another kind": ({**FP8, "scale_fmt": "ue4m3"}, "scale_fmt is 'ue4m3'; allowed: 'float' or 'ue8m0'"),
    "fp8 experts of another kind": ({**FP8, "expert_dtype": "int4"}, "expert_dtype is 'int4'; allowed: 'fp8' or 'fp4'"),
    "gptq, 3 bits": ({**GPTQ, "bits": 3}, "bits is 3; supported for gptq: 2, 4, 8"),
    "gptq, no bits": ({"quant_method": "gptq", "group_size": 32}, "quantization_config.bits is None; allowed: a positive whole number"),
    "gptq, groups beyond any size": ({**GPTQ, "group_size": 2**63}, "group_size is 9223372036854775808; allowed: .* at most 2147483647"),
    "fp8, blocks beyond any size": ({**FP8, "weight_block_size": [2**63, 1]}, "weight_block_size is .*; allowed: .* at most 2147483647"),
    "int8, blocks beyond any size": (
        {**PACKED_SETTINGS, "format": "int-quantized", "config_groups": BLOCKS},
        "block_structure '9223372036854775808x1'; allowed: .* at most 2147483647",
    ),
    "gptq, marlin": ({**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'; supported: gptq, gptq_v2"),
    "gptq, rotated": ({**GPTQ, "rotation": "hadamard"}, "rotation is 'hadamard'; supported: none"),
    "gptq, groups of none": ({**GPTQ, "group_size": 0}, "group_size is 0; allowed: a positive whole number"),
    "gptq, a rule that is none": ({**GPTQ, "dynamic": {"+:(": {}}}, "dynamic has the pattern "),
    "gptq, a rule without end": ({**GPTQ, "dynamic": {r"-:(\w+\.?)+!": {}}}, "names can match in too many ways"),
    "ignored without end": ({**PACKED_SETTINGS, "ignore": [r"re:(\w+\.?)+!"]}, "names can match in too many ways"),
    "awq, gemv": ({**AWQ, "version": "gemv"}, "version is 'gemv'; supported for awq: 'gemm'"),
    "awq, llm-awq": ({**AWQ, "format": "llm-awq"}, "format is 'llm-awq'; supported for awq: 'gemm'"),
    "awq, 8 bits": ({**AWQ, "bits": 8}, "bits is 8; supported for awq: 4"),
    "awq, no zeros": ({**AWQ, "zero_point": False}, "zero_point is False; supported for awq: True"),
    "2:4": ({**PACKED_SETTINGS, "format": "marlin-24", "config_groups": NO_FORMAT}, "format is 'marlin-24'; supported for "),
    "sparse": ({**PACKED_SETTINGS, "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config is "),
    "rotated": ({**PACKED_SETTINGS, "transform_config": {"config_groups": {"a": {}}}}, "transform_config is "),
    "not compressed yet": ({**PACKED_SETTINGS, "quantization_status": "calibration"}, "quantization_status is 'calibration'"),
    "packed, 3 bits": (packed_as(num_bits=3), "weights of type int with 3 bits; supported in this format: int with 2, 4, 8"),
    "packed, in blocks": (packed_as(strategy="block", group_size=None, block_structure=[8, 8]), "packed weights in blocks"),
    "no groups": ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "config_groups is not a table"),
    "modelopt, another": ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "quant_algo is 'W4A8_AWQ'; supported: FP8, "),
}


@pytest.mark.parametrize("title", REFUSED)
def test_what_is_refused_is_not_planned(title: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings, sentence = REFUSED[title]
    folder_of(tmp_path, settings, weights(plain)[0])
    with pytest.raises(CheckpointError, match=rf"config\.json: .*({sentence})"):
        MoELayer.from_checkpoint(tmp_path)
    assert main(["plan", str(tmp_path)]) == 2
    assert "config.json: " in capsys.readouterr().err


def without(suffix: str, write: Writer) -> Stored:
    return {name: tensor for name, tensor in weights(write)[0].items() if not name.endswith(suffix)}


#: settings, tensors, and what the message says
CONTRADICTIONS: dict[str, tuple[object, Stored, str]] = {
    "nothing says that weights are packed": (None, weights(gptq())[0], r"index has .*\.qweight, but config\.json without .* does not say"),
    "nothing says what scales are": (None, weights(fp8_scaled("weight_scale", (1, 10**6)))[0], r"weight_scale \(and 11 more\) belongs to"),
    "weights as they are": (FP8, weights(plain)[0], r"fp8 says that .*weight is stored in few bits, but the index has no scales of it"),
    "packed weights as they are": (GPTQ, weights(plain)[0], "gptq says that .* is stored in few bits"),
    "no zeros": (GPTQ, without("qzeros", gptq()), r"tensor .*\.qzeros is missing, which belongs to .*weight as GPTQ int4"),
    "no order": ({**GPTQ, "desc_act": True}, without("g_idx", gptq(desc_act=True)), r"tensor .*\.g_idx is missing"),
    "no order of packed columns": (packed_as(actorder="group"), weights(PACKED.write)[0], r"tensor .*\.weight_g_idx is missing"),
    "no second scale": (NVFP4, without("weight_scale_2", nvfp4_modelopt), r"weight_scale_2 is missing"),
    "ignored, but packed": (
        {**PACKED_SETTINGS, "ignore": ["re:.*experts.*"]},
        weights(PACKED.write)[0],
        "the index has .*, but compressed-tensors does not say",
    ),
    "scaled inputs": (
        NVFP4,
        weights(nvfp4_modelopt)[0] | {f"{LAYER}.experts.0.gate_proj.pre_quant_scale": torch.ones(SIZE)},
        "pre_quant_scale, which multiplies what goes into",
    ),
}


@pytest.mark.parametrize("title", CONTRADICTIONS)
def test_an_index_that_contradicts_config_json(title: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings, tensors, sentence = CONTRADICTIONS[title]
    before_download(folder_of(tmp_path, settings, tensors))
    with pytest.raises(CheckpointError, match=sentence):
        layer_sources(load_config(tmp_path))
    assert main(["plan", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
