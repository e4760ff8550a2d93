"""Every type that safetensors knows, in every place: read as its format defines, or refused with file, tensor and type."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moeserve import CheckpointError, MoELayer
from moeserve.checkpoints import layer_sources
from moeserve.checkpoints.safetensors_folder import SafetensorsFolder
from moeserve.checkpoints.whole_numbers import read_whole_numbers
from moeserve.config import Quantization, load_config
from moeserve.experts import ExpertShard
from tests.checkpoints.published import PUBLISHED
from tests.checkpoints.quantized_folders import EXPERTS, LAYER, SIZE, folder_of, plain, weights
from tests.support.checkpoints_on_disk import write_folder
from tests.support.stacked import stacked

_IN_BITS = {
    8: "BOOL U8 I8 F8_E5M2 F8_E4M3 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ",
    16: "I16 U16 F16 BF16",
    32: "I32 U32 F32",
    64: "C64 F64 I64 U64",
    4: "F4",
    6: "F6_E2M3 F6_E3M2",
}
BITS: Mapping[str, int] = {name: bits for bits, names in _IN_BITS.items() for name in names.split()}
FLOATS, FP8, EXPONENTS = {"F32", "F16", "BF16"}, {"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}, {"U8", "F8_E8M0"}
GPT_OSS = {
    "model_type": "gpt_oss",
    "num_hidden_layers": 1,
    "hidden_size": SIZE,
    "intermediate_size": SIZE,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": 1,
    "quantization_config": {"quant_method": "mxfp4"},
}
UP = f"{LAYER}.experts.1.up_proj"


def published(title: str, folder: Path) -> Path:
    return folder_of(folder, PUBLISHED[title].quantization_config, weights(PUBLISHED[title].write)[0])


def as_they_are(folder: Path) -> Path:
    return folder_of(folder, None, weights(plain)[0])


def gpt_oss(folder: Path) -> Path:
    tensors = {f"{LAYER}.router.weight": torch.randn(EXPERTS, SIZE), f"{LAYER}.router.bias": torch.zeros(EXPERTS)}
    for name, rows in (("gate_up_proj", 2 * SIZE), ("down_proj", SIZE)):
        tensors[f"{LAYER}.experts.{name}_blocks"] = torch.zeros(EXPERTS, rows, SIZE // 32, 16, dtype=torch.uint8)
        tensors[f"{LAYER}.experts.{name}_scales"] = torch.full((EXPERTS, rows, SIZE // 32), 120, dtype=torch.uint8)
        tensors[f"{LAYER}.experts.{name}_bias"] = torch.zeros(EXPERTS, rows)
    return write_folder(folder, GPT_OSS, tensors)


def retype(folder: Path, name: str, dtype: str) -> None:
    """The same file with zeros of another type in the place of a tensor."""
    path = folder / "model.safetensors"
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    parts, offset = [], 0
    for tensor, entry in ((tensor, header[tensor]) for tensor in sorted(header, key=lambda each: each == name) if tensor != "__metadata__"):
        first, last = entry["data_offsets"]
        part = content[start + first : start + last]
        if tensor == name:
            entry["dtype"], part = dtype, bytes(prod(entry["shape"]) * BITS[dtype] // 8)
        entry["data_offsets"] = [offset, offset + len(part)]
        parts.append(part)
        offset += len(part)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(parts))


PLACES = {
    "weight": (as_they_are, f"{UP}.weight", FLOATS),
    "gate": (as_they_are, f"{LAYER}.gate.weight", FLOATS),
    "selection bias": (as_they_are, f"{LAYER}.gate.e_score_correction_bias", FLOATS),
    "bias of a gate": (gpt_oss, f"{LAYER}.router.bias", FLOATS),
    "bias of experts": (gpt_oss, f"{LAYER}.experts.gate_up_proj_bias", FLOATS),
    "MXFP4 blocks": (gpt_oss, f"{LAYER}.experts.down_proj_blocks", {"U8"}),
    "MXFP4 scales": (gpt_oss, f"{LAYER}.experts.down_proj_scales", EXPONENTS),
    "FP8": ("fp8, exponents", f"{UP}.weight", FP8),
    "its scales": ("fp8, exponents", f"{UP}.weight_scale_inv", FLOATS | EXPONENTS),
    "scales of MXFP8": ("compressed-tensors MXFP8", f"{UP}.weight_scale", EXPONENTS),
    "FP4": ("modelopt NVFP4", f"{UP}.weight", {"U8"}),
    "scales of NVFP4": ("modelopt NVFP4", f"{UP}.weight_scale", {"F8_E4M3"}),
    "global scale of NVFP4": ("modelopt NVFP4", f"{UP}.weight_scale_2", {"F32"}),
    "int8": ("compressed-tensors INT8 with zeros", f"{UP}.weight", {"I8"}),
    "zeros of int8": ("compressed-tensors INT8 with zeros", f"{UP}.weight_zero_point", {"I8"}),
    "packed": ("compressed-tensors packed INT4 with zeros", f"{UP}.weight_packed", {"I32"}),
    "packed zeros": ("compressed-tensors packed INT4 with zeros", f"{UP}.weight_zero_point", {"I32"}),
    "scales of packed": ("compressed-tensors packed INT4 with zeros", f"{UP}.weight_scale", FLOATS),
    "qweight": ("gptq", f"{UP}.qweight", {"I32"}),
    "qzeros": ("gptq", f"{UP}.qzeros", {"I32"}),
    "g_idx": ("gptq", f"{UP}.g_idx", {"I32"}),
    "scales of AWQ": ("awq", f"{UP}.scales", FLOATS),
}


#: all but one number of four or six bits, which no file can hold
CASES = [(place, dtype) for place in PLACES for dtype in BITS if BITS[dtype] % 8 == 0 or place != "global scale of NVFP4"]


@pytest.mark.parametrize(("place", "dtype"), CASES)
def test_it_is_read_or_refused(place: str, dtype: str, tmp_path: Path) -> None:
    made, name, served = PLACES[place]
    folder = published(made, tmp_path) if isinstance(made, str) else made(tmp_path)
    retype(folder, name, dtype)
    if dtype in served:
        answer = MoELayer.from_checkpoint(folder)(torch.randn(3, SIZE, dtype=torch.bfloat16))
        assert bool(torch.isfinite(answer).all())
        return
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: tensor {name} is stored as {dtype}; supported: ") as caught:
        MoELayer.from_checkpoint(folder)
    assert served == set(str(caught.value).rpartition("supported: ")[2].split(", "))


def test_a_type_that_safetensors_does_not_know(tmp_path: Path) -> None:
    path = as_they_are(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"X32"'))
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a complete safetensors file: .*X32"):
        MoELayer.from_checkpoint(tmp_path)


def test_an_exponent_that_is_no_number(tmp_path: Path) -> None:
    """255 is NaN in E8M0."""
    folder = published("fp8, exponents", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{UP}.weight_scale_inv"][0, 0] = 255
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"tensor {UP}\.weight holds NaN or Inf"):
        MoELayer.from_checkpoint(folder)


@pytest.mark.parametrize("quantization", [None, "none"])
@pytest.mark.parametrize(
    ("title", "name", "value"),
    [
        ("compressed-tensors NVFP4", "weight_global_scale", 0.0),
        ("compressed-tensors NVFP4", "weight_global_scale", math.inf),
        ("modelopt NVFP4", "weight_scale_2", math.nan),
    ],
)
def test_a_global_scale_that_no_number_has(title: str, name: str, value: float, quantization: Quantization | None, tmp_path: Path) -> None:
    folder = published(title, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{UP}.{name}"].fill_(value)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"tensor {UP}\.{name} is {value}; allowed: a finite number"):
        MoELayer.from_checkpoint(folder, quantization=quantization)


def test_the_smallest_and_the_largest_exponent(tmp_path: Path) -> None:
    folder = published("fp8, exponents", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{UP}.weight"].fill_(1)
    tensors[f"{UP}.weight_scale_inv"][0, 0], tensors[f"{UP}.weight_scale_inv"][1, 1] = 0, 254
    save_file(tensors, folder / "model.safetensors")
    (source,) = layer_sources(load_config({"model": {"checkpoint": folder, "dtype": "float32"}}))
    up = stacked(source.experts([ExpertShard(1)])).gate_up_proj[0, SIZE:]
    assert (up[0, 0].item(), up[-1, -1].item()) == (2.0**-127, 2.0**127)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
def test_a_table_of_whole_numbers(dtype: torch.dtype, tmp_path: Path) -> None:
    table = torch.arange(12).view(4, 3).to(dtype)
    save_file({"before": torch.ones(1), "table": table}, tmp_path / "model.safetensors")
    files = SafetensorsFolder(tmp_path)
    assert torch.equal(read_whole_numbers(files, "table", (4, 3)), table.long())
    os.utime(tmp_path / "model.safetensors", (1, 1))
    with pytest.raises(CheckpointError, match="changed while the checkpoint was read"):
        read_whole_numbers(files, "table", (4, 3))
