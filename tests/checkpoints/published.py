"""Weights in the formats that checkpoints are published in, each with the numbers it stands for, worked out without moeserve.

R rows, C columns. What compressed-tensors writes is written and decoded by that library; the other formats by NumPy, number by number from
their definition.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Stored = dict[str, Tensor]
#: (module, shape, generator) -> the tensors of its weight in the file, and its numbers [R, C] float32
Writer = Callable[[str, tuple[int, int], torch.Generator], tuple[Stored, Tensor]]

FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Published:
    """A format: what config.json says, and how a weight is written."""

    quantization_config: Mapping[str, Any]
    write: Writer


def _floats(shape: tuple[int, ...], generator: torch.Generator, low: float = 0.02, high: float = 0.2) -> Tensor:
    return torch.rand(shape, generator=generator) * (high - low) + low


def _spread(scales: Tensor, shape: tuple[int, int], block: tuple[int, int]) -> Tensor:
    """One for each number, of those that blocks share."""
    down, across = (torch.arange(size) // part for size, part in zip(shape, block, strict=True))
    return scales[down][:, across]


def fp8_scaled(
    suffix: str,
    block: tuple[int, int],
    stored: str = "float32",
    dtype: torch.dtype = torch.float8_e4m3fn,
    written: tuple[int, ...] | None = None,
) -> Writer:
    """FP8 numbers times scales; stored: as which type the scales are, "exponents" = powers of two in one byte; written: their shape."""

    def write(module: str, shape: tuple[int, int], generator: torch.Generator) -> tuple[Stored, Tensor]:
        numbers = torch.randn(shape, generator=generator).to(dtype)
        size = tuple(-(-whole // part) for whole, part in zip(shape, block, strict=True))
        if stored.startswith("exponents"):
            exponents = torch.randint(120, 125, size, generator=generator)
            scales, kept = torch.tensor(2.0) ** (exponents - 127), exponents.to(torch.uint8)
            kept = kept.view(torch.float8_e8m0fnu) if stored == "exponents as E8M0" else kept
        else:
            kept = _floats(size, generator).to(getattr(torch, stored))
            scales = kept.float()
        kept = kept if written is None else kept.reshape(written)
        return {f"{module}.weight": numbers, f"{module}.{suffix}": kept}, numbers.float() * _spread(scales, shape, block)

    return write


def _packed_fp4(codes: Tensor) -> Tensor:
    return (codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8)


def nvfp4_modelopt(module: str, shape: tuple[int, int], generator: torch.Generator) -> tuple[Stored, Tensor]:
    codes = torch.randint(0, 16, shape, generator=generator)
    scales = (torch.rand(shape[0], shape[1] // 16, generator=generator) * 200 + 50).to(torch.float8_e4m3fn)
    factor = torch.tensor(0.0003)
    tensors = {
        f"{module}.weight": _packed_fp4(codes),
        f"{module}.weight_scale": scales,
        f"{module}.weight_scale_2": factor,
        f"{module}.input_scale": torch.tensor(0.01),
    }
    return tensors, FP4[codes] * _spread(scales.float() * factor, shape, (1, 16))


def fp4_experts(module: str, shape: tuple[int, int], generator: torch.Generator) -> tuple[Stored, Tensor]:
    """As the experts of DeepSeek-V4: FP4 in int8, exponents as `scale`."""
    codes = torch.randint(0, 16, shape, generator=generator)
    exponents = torch.randint(120, 125, (shape[0], shape[1] // 32), generator=generator)
    tensors = {
        f"{module}.weight": _packed_fp4(codes).view(torch.int8),
        f"{module}.scale": exponents.to(torch.uint8).view(torch.float8_e8m0fnu),
    }
    return tensors, FP4[codes] * _spread(torch.tensor(2.0) ** (exponents - 127), shape, (1, 32))


def _words(codes: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """[n, m] -> [n, m * bits / 32] int32, number by number."""
    per_word = 32 // bits
    words = np.zeros((codes.shape[0], codes.shape[1] // per_word), dtype=np.uint32)
    for place, number in enumerate(order or range(per_word)):
        words |= codes[:, number::per_word].astype(np.uint32) << np.uint32(place * bits)
    return torch.from_numpy(words.view(np.int32))


def gptq(bits: int = 4, group: int = 32, *, is_v1: bool = True, sym: bool = False, desc_act: bool = False) -> Writer:
    def write(module: str, shape: tuple[int, int], generator: torch.Generator) -> tuple[Stored, Tensor]:
        rows, columns = shape
        count = columns // group if group > 0 else 1
        of_column = torch.arange(columns) // (group if group > 0 else columns)
        if desc_act:
            of_column = of_column[torch.randperm(columns, generator=generator)]
        codes = torch.randint(0, 2**bits, shape, generator=generator)
        # A zero of 0 is written as -1, which is all ones.
        zeros = torch.full((rows, count), 2 ** (bits - 1)) if sym else torch.randint(0, 2**bits, (rows, count), generator=generator)
        scales = (_floats((rows, count), generator) / 2 ** (bits - 4)).half()
        written = (zeros - 1) % 2**bits if is_v1 else zeros
        tensors = {
            f"{module}.qweight": _words(codes.numpy(), bits).t().contiguous(),
            f"{module}.qzeros": _words(written.t().numpy(), bits),
            f"{module}.scales": scales.t().contiguous(),
            f"{module}.g_idx": of_column.to(torch.int32),
        }
        return tensors, (codes - zeros[:, of_column]).float() * scales.float()[:, of_column]

    return write


def awq(group: int = 32) -> Writer:
    def write(module: str, shape: tuple[int, int], generator: torch.Generator) -> tuple[Stored, Tensor]:
        rows, columns = shape
        codes = torch.randint(0, 16, shape, generator=generator)
        zeros = torch.randint(0, 16, (rows, columns // group), generator=generator)
        scales = _floats((rows, columns // group), generator).half()
        tensors = {
            f"{module}.qweight": _words(codes.t().numpy(), 4, AWQ_ORDER),
            f"{module}.qzeros": _words(zeros.t().numpy(), 4, AWQ_ORDER),
            f"{module}.scales": scales.t().contiguous(),
        }
        return tensors, (codes - _spread(zeros, shape, (1, group))).float() * _spread(scales.float(), shape, (1, group))

    return write


def compressed(preset: str, written: str, **changes: Any) -> Published:
    """As the library writes it: `preset` is one of its schemes, `changes` those of its weights."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme

    scheme = preset_name_to_scheme(preset, ["Linear"])
    weights = {**scheme.weights.model_dump(), **changes}
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=scheme.input_activations)
    compressor = BaseCompressor.get_value_from_registry(written)

    def write(module: str, shape: tuple[int, int], generator: torch.Generator) -> tuple[Stored, Tensor]:
        state = {"weight": torch.randn(shape, generator=generator) * 0.3, **_parameters(scheme.weights, shape, generator)}
        stored = compressor.compress(state, scheme)
        numbers = compressor.decompress(stored, scheme)["weight"]
        if scheme.weights.num_bits == 4 and str(scheme.weights.type) == "float":
            numbers = _fp4_in_float32(stored, scheme.weights, shape)
        assert numbers.dtype == torch.float32 or written.startswith("mxfp8"), "powers of two lose nothing in bfloat16"
        numbers = numbers.float()
        return {f"{module}.{name}": tensor for name, tensor in stored.items()}, numbers

    group = {"targets": ["Linear"], "weights": scheme.weights.model_dump(mode="json"), "format": written}
    return Published({"quant_method": "compressed-tensors", "format": written, "config_groups": {"group_0": group}}, write)


def _fp4_in_float32(stored: Stored, weights: Any, shape: tuple[int, int]) -> Tensor:
    """As the library decodes it, whose own choice is to round each step to bfloat16."""
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    numbers = unpack_fp4_from_uint8(stored["weight_packed"], *shape, dtype=torch.float32)
    scales = stored["weight_scale"]
    scales = torch.tensor(2.0) ** (scales.int() - 127) if scales.dtype == torch.uint8 else scales.float()
    return dequantize(numbers, scales, args=weights, global_scale=stored.get("weight_global_scale"), dtype=torch.float32)


def _parameters(weights: Any, shape: tuple[int, int], generator: torch.Generator) -> Stored:
    """Scales and zeros that a calibration might have found."""
    rows, columns = shape
    sizes = {
        "tensor": (1,),
        "channel": (rows, 1),
        "group": (rows, columns // (weights.group_size or columns)),
        "tensor_group": (rows, columns // (weights.group_size or columns)),
        "block": tuple(-(-whole // part) for whole, part in zip(shape, weights.block_structure or shape, strict=True)),
    }
    size = sizes[str(weights.strategy)]
    scales = _floats(size, generator) / (1 if weights.num_bits == 4 else 8)
    found = {"weight_scale": scales}
    if weights.scale_dtype is torch.uint8:
        found["weight_scale"] = torch.tensor(2.0) ** torch.randint(-4, 0, size, generator=generator)
    if str(weights.strategy) == "tensor_group":
        found = {"weight_scale": (scales * 1000).to(torch.float8_e4m3fn).float(), "weight_global_scale": torch.tensor([1000.0])}
    if not weights.symmetric:
        half = 2 ** (weights.num_bits - 1)
        found["weight_zero_point"] = torch.randint(-half, half, size, generator=generator).to(torch.int8)
    return found


_FINE = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
_BLOCKS = {**_FINE, "weight_block_size": [32, 32]}
_EXPONENTS = {**_BLOCKS, "scale_fmt": "ue8m0"}
_MODELOPT = {"quant_method": "modelopt"}
#: a scale for a whole tensor
_WHOLE = (10**6, 10**6)

PUBLISHED: dict[str, Published] = {
    "fp8": Published(_BLOCKS, fp8_scaled("weight_scale_inv", (32, 32))),
    "fp8, scales in bfloat16": Published(_BLOCKS, fp8_scaled("weight_scale_inv", (32, 32), "bfloat16")),
    "fp8, exponents": Published(_EXPONENTS, fp8_scaled("weight_scale_inv", (32, 32), "exponents")),
    "fp8, exponents as E8M0": Published(_EXPONENTS, fp8_scaled("scale", (32, 32), "exponents as E8M0")),
    "fp8, E5M2": Published(_BLOCKS, fp8_scaled("weight_scale_inv", (32, 32), dtype=torch.float8_e5m2)),
    "fp8, FNUZ": Published(_BLOCKS, fp8_scaled("weight_scale_inv", (32, 32), dtype=torch.float8_e4m3fnuz)),
    "mxfp8": Published({**_EXPONENTS, "weight_block_size": [1, 32]}, fp8_scaled("weight_scale_inv", (1, 32), "exponents")),
    "fp8 of a tensor": Published({**_FINE, "weight_block_size": None}, fp8_scaled("weight_scale_inv", _WHOLE, written=())),
    "fp8 of a tensor, AutoFP8": Published(
        {"quant_method": "fp8", "activation_scheme": "static"}, fp8_scaled("weight_scale", _WHOLE, written=(1,))
    ),
    "fp8, fp4 experts": Published({**_EXPONENTS, "expert_dtype": "fp4"}, fp4_experts),
    "fbgemm_fp8": Published({"quant_method": "fbgemm_fp8"}, fp8_scaled("weight_scale", (1, 10**6))),
    "modelopt FP8": Published({**_MODELOPT, "quant_algo": "FP8"}, fp8_scaled("weight_scale", _WHOLE, written=())),
    "modelopt FP8 by channel": Published(
        {**_MODELOPT, "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}, fp8_scaled("weight_scale", (1, 10**6), written=(-1,))
    ),
    "modelopt FP8 by block": Published(
        {**_MODELOPT, "quant_algo": "fp8_pb_wo"}, fp8_scaled("weight_scale", (128, 128), written=(-1, 1, 1, 1))
    ),
    "modelopt MXFP8": Published({**_MODELOPT, "quant_algo": "MXFP8"}, fp8_scaled("weight_scale", (1, 32), "exponents")),
    "modelopt NVFP4": Published({**_MODELOPT, "quant_algo": "NVFP4", "group_size": 16}, nvfp4_modelopt),
    "gptq": Published({"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}, gptq(sym=True)),
    "gptq, asymmetric": Published({"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}, gptq()),
    "gptq, 8 bits": Published({"quant_method": "gptq", "bits": 8, "group_size": 32, "sym": False}, gptq(8)),
    "gptq, 2 bits": Published({"quant_method": "gptq", "bits": 2, "group_size": 32, "sym": False}, gptq(2)),
    "gptq, desc_act": Published({"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": False}, gptq(desc_act=True)),
    "gptq, one group": Published({"quant_method": "gptq", "bits": 4, "group_size": -1, "sym": False}, gptq(group=-1)),
    "gptq_v2": Published(
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "checkpoint_format": "gptq_v2"}, gptq(is_v1=False)
    ),
    "awq": Published({"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}, awq()),
    "compressed-tensors FP8 of a tensor": compressed("FP8", "float-quantized"),
    "compressed-tensors FP8 by channel": compressed("FP8_DYNAMIC", "float-quantized"),
    "compressed-tensors FP8 by block": compressed("FP8_BLOCK", "float-quantized", block_structure=[32, 32]),
    "compressed-tensors FP8, naive": compressed("FP8_DYNAMIC", "naive-quantized"),
    "compressed-tensors INT8 by channel": compressed("INT8", "int-quantized"),
    "compressed-tensors INT8 of a tensor": compressed("INT8", "int-quantized", strategy="tensor"),
    "compressed-tensors INT8 with zeros": compressed("INT8", "int-quantized", symmetric=False),
    "compressed-tensors INT4, naive": compressed("W4A16", "naive-quantized", group_size=32),
    "compressed-tensors packed INT4": compressed("W4A16", "pack-quantized", group_size=32),
    "compressed-tensors packed INT4 with zeros": compressed("W4A16_ASYM", "pack-quantized", group_size=32),
    "compressed-tensors packed INT4 by channel": compressed("W4A16_ASYM", "pack-quantized", strategy="channel", group_size=None),
    "compressed-tensors packed INT8": compressed("W8A16", "pack-quantized", group_size=32),
    "compressed-tensors packed INT8 with zeros": compressed("W8A16", "pack-quantized", group_size=32, symmetric=False),
    "compressed-tensors NVFP4": compressed("NVFP4", "nvfp4-pack-quantized"),
    "compressed-tensors MXFP4": compressed("MXFP4", "mxfp4-pack-quantized"),
    "compressed-tensors MXFP8": compressed("MXFP8", "mxfp8-quantized"),
}
