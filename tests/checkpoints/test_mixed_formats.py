"""Rules that give modules formats of their own, settings in files of their own, and what some tools write beside the weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moeserve import CheckpointError, MoELayer
from tests.checkpoints.published import PUBLISHED, Stored, gptq
from tests.checkpoints.quantized_folders import (
    AWQ,
    EXPERTS,
    FP8,
    GPTQ,
    KINDS,
    LAYER,
    PACKED,
    SIZE,
    check_held,
    folder_of,
    group_of,
    joined,
    packed_as,
    plain,
    weights,
)

FIRST, REST = range(2), range(2, EXPERTS)
FIRST_PATTERN = r"re:.*experts\.[01]\..*"
EIGHT_BITS, NVFP4, BY_CHANNEL = (f"compressed-tensors {name}" for name in ("packed INT8", "NVFP4", "FP8 by channel"))


def written(title: str, experts: range) -> tuple[Stored, Stored]:
    return weights(PUBLISHED[title].write, experts)


#: settings, and the experts as they are stored
MIXED: dict[str, tuple[Mapping[str, Any], tuple[Stored, Stored]]] = {
    "modules_to_not_convert": (
        {**FP8, "modules_to_not_convert": [f"{LAYER}.experts.0", f"{LAYER}.experts.1", "lm_head"]},
        joined(weights(plain, FIRST), written("fp8", REST)),
    ),
    "awq, modules_to_not_convert": (
        {**AWQ, "modules_to_not_convert": ["experts.0", "experts.1"]},
        joined(weights(plain, FIRST), written("awq", REST)),
    ),
    "gptq, modules_in_block_to_quantize": (
        {**GPTQ, "modules_in_block_to_quantize": [["self_attn.q_proj"], ["mlp.experts.2.up_proj"]]},
        joined(weights(plain, FIRST), weights(gptq(), REST)),
    ),
    "gptq, dynamic": (
        {**GPTQ, "dynamic": {r"-:.*experts\.0\..*": {}, r"+:.*experts\.1\..*": {"bits": 8, "group_size": -1}}},
        joined(weights(plain, range(1)), weights(gptq(8, -1), range(1, 2)), weights(gptq(), REST)),
    ),
    "compressed-tensors, ignore": (
        {**PACKED.quantization_config, "ignore": [FIRST_PATTERN, "lm_head"]},
        joined(weights(plain, FIRST), weights(PACKED.write, REST)),
    ),
    "compressed-tensors, a pattern wins over a kind": (
        {
            **PACKED.quantization_config,
            "config_groups": {**PACKED.quantization_config["config_groups"], "some": group_of(EIGHT_BITS, FIRST_PATTERN)},
        },
        joined(written(EIGHT_BITS, FIRST), weights(PACKED.write, REST)),
    ),
    "compressed-tensors, a name wins over a pattern": (
        {
            "quant_method": "compressed-tensors",
            "format": "mixed-precision",
            "config_groups": {
                "all": group_of(BY_CHANNEL, "re:.*experts.*"),
                "some": group_of(NVFP4, *(f"{LAYER}.experts.{expert}.{kind}_proj" for expert in FIRST for kind in KINDS)),
            },
        },
        joined(written(NVFP4, FIRST), written(BY_CHANNEL, REST)),
    ),
    "modelopt, quantized_layers": (
        {
            "quant_method": "modelopt",
            "quant_algo": "MIXED_PRECISION",
            "quantized_layers": {
                **{f"{LAYER}.experts.{expert}": {"quant_algo": "NVFP4"} for expert in FIRST},
                **{f"{LAYER}.experts.{expert}.{kind}_proj": {"quant_algo": "FP8"} for expert in REST for kind in KINDS},
            },
        },
        joined(written("modelopt NVFP4", FIRST), written("modelopt FP8", REST)),
    ),
}


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
    with pytest.raises(CheckpointError, match=rf"tensor {name} is not zero, but this projection has no bias"):
        MoELayer.from_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("group", "sentence"), [(-1, r"up_proj\.g_idx names group -1; allowed: from 0"), (2, r"up_proj\.qzeros has 2 rows, but .* names 2")]
)
def test_groups_that_do_not_exist(group: int, sentence: str, tmp_path: Path) -> None:
    tensors, _ = weights(gptq())
    tensors[f"{LAYER}.experts.1.up_proj.g_idx"] = torch.full((SIZE,), group, dtype=torch.int32)
    with pytest.raises(CheckpointError, match=sentence):
        MoELayer.from_checkpoint(folder_of(tmp_path, GPTQ, tensors))


@pytest.mark.parametrize(
    ("group", "sentence"),
    [
        (-2, r"up_proj\.weight_g_idx names group -2; allowed: from 0"),
        (2, r"up_proj\.weight_scale has 2 columns, but .* names 2"),
        (2**31 - 1, r"up_proj\.weight_scale has 2 columns, but .* names 2147483647"),
    ],
)
@pytest.mark.parametrize("quantization", [None, "none"])
def test_groups_of_packed_columns_that_do_not_exist(quantization: str | None, group: int, sentence: str, tmp_path: Path) -> None:
    """Behind the scales of a row are those of the next one, and behind all of them another tensor."""
    tensors, numbers = weights(PACKED.write)
    tensors |= {f"{module}.weight_g_idx": (torch.arange(SIZE) // 32).to(torch.int32) for module in numbers}
    tensors[f"{LAYER}.experts.1.up_proj.weight_g_idx"][-1] = group
    with pytest.raises(CheckpointError, match=sentence):
        MoELayer.from_checkpoint(folder_of(tmp_path, packed_as(actorder="group"), tensors), quantization=quantization)


@pytest.mark.parametrize("is_ordered", [True, False])
def test_packed_columns_in_an_order_of_their_own(is_ordered: bool, tmp_path: Path) -> None:
    """As llm-compressor wrote `actorder: "group"`; -1 in every place where there is none."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    (tensors, numbers), generator = weights(PACKED.write), torch.Generator().manual_seed(4)
    for module in numbers:
        order = torch.randint(0, 2, (SIZE,), generator=generator) if is_ordered else torch.full((SIZE,), -1)
        group = order if is_ordered else torch.arange(SIZE) // 32
        codes = unpack_from_int32(tensors[f"{module}.weight_packed"], 4, torch.Size([SIZE, SIZE]))
        tensors[f"{module}.weight_g_idx"] = order.to(torch.int32)
        numbers[module] = codes.float() * tensors[f"{module}.weight_scale"].float()[:, group]
    check_held(folder_of(tmp_path, packed_as(actorder="group"), tensors), numbers)


def test_sizes_that_no_words_hold(tmp_path: Path) -> None:
    tensors, _ = weights(gptq())
    with pytest.raises(CheckpointError, match=r"experts\.\d\.\w+\.weight is 60 x 64, but GPTQ int4 packs 8 numbers in a word"):
        MoELayer.from_checkpoint(folder_of(tmp_path, GPTQ, tensors, moe_intermediate_size=60))
