"""Folders of one small MoE layer whose experts are stored in one of the published formats, or in several."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeserve.checkpoints import layer_sources
from moeserve.config import load_config
from moeserve.experts import ExpertShard
from tests.checkpoints.published import PUBLISHED, Stored, Writer, compressed
from tests.support.checkpoints_on_disk import write_folder
from tests.support.stacked import stacked

SIZE, EXPERTS = 64, 4
KINDS = ("gate", "up", "down")
LAYER = "model.layers.0.mlp"
CONFIG: Mapping[str, Any] = {
    "model_type": "deepseek_v3",
    "num_hidden_layers": 1,
    "first_k_dense_replace": 0,
    "hidden_size": SIZE,
    "moe_intermediate_size": SIZE,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": 1,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 0,
    "hidden_act": "silu",
    "dtype": "bfloat16",
}

FP8 = {"quant_method": "fp8", "weight_block_size": [32, 32]}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}
AWQ = PUBLISHED["awq"].quantization_config
NVFP4 = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
PACKED = compressed("W4A16", "pack-quantized", group_size=32)


def group_of(title: str, *targets: str) -> dict[str, Any]:
    """The only group of a format of compressed-tensors, with other targets."""
    return {**PUBLISHED[title].quantization_config["config_groups"]["group_0"], "targets": list(targets)}


def packed_as(**changes: object) -> dict[str, Any]:
    """PACKED, with other settings for its weights."""
    group = PACKED.quantization_config["config_groups"]["group_0"]
    return {**PACKED.quantization_config, "config_groups": {"group_0": {**group, "weights": {**group["weights"], **changes}}}}


def gates() -> Stored:
    return {f"{LAYER}.gate.weight": torch.randn(EXPERTS, SIZE), f"{LAYER}.gate.e_score_correction_bias": torch.zeros(EXPERTS)}


def weights(write: Writer, experts: range = range(EXPERTS)) -> tuple[Stored, Stored]:
    """The tensors of experts in the file, and the numbers of each of their weights, by module."""
    generator, stored, numbers = torch.Generator().manual_seed(1), {}, {}
    for module in (f"{LAYER}.experts.{expert}.{kind}_proj" for expert in experts for kind in KINDS):
        tensors, numbers[module] = write(module, (SIZE, SIZE), generator)
        stored |= tensors
    return stored, numbers


def joined(*parts: tuple[Stored, Stored]) -> tuple[Stored, Stored]:
    """Experts written in several ways."""
    return {name: tensor for stored, _ in parts for name, tensor in stored.items()}, {
        module: tensor for _, numbers in parts for module, tensor in numbers.items()
    }


def plain(module: str, shape: tuple[int, int], generator: torch.Generator) -> tuple[Stored, Tensor]:
    """Weights as they are."""
    weight = torch.randn(shape, generator=generator)
    return {f"{module}.weight": weight}, weight


def folder_of(folder: Path, settings: object, tensors: Mapping[str, Tensor], **config: object) -> Path:
    """settings: the quantization_config, None = there is none."""
    quantized = {} if settings is None else {"quantization_config": settings}
    return write_folder(folder, {**CONFIG, **quantized, **config}, {**gates(), **tensors})


def check_held(folder: Path, numbers: Mapping[str, Tensor]) -> None:
    """Whether experts have exactly these numbers, but for one rounding."""
    (source,) = layer_sources(load_config({"model": {"checkpoint": folder, "dtype": "float32"}}))
    held = stacked(source.experts([ExpertShard(expert) for expert in range(EXPERTS)]))
    for expert in range(EXPERTS):
        gate, up, down = (numbers[f"{LAYER}.experts.{expert}.{kind}_proj"] for kind in KINDS)
        torch.testing.assert_close(held.gate_up_proj[expert], torch.cat([gate, up]), rtol=1e-6, atol=0)
        torch.testing.assert_close(held.down_proj[expert], down, rtol=1e-6, atol=0)
