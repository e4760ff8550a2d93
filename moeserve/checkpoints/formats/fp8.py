"""FP8 as DeepSeek-V3, transformers and fbgemm write it: `weight`, and scales beside it."""

from __future__ import annotations

from collections.abc import Container
from typing import Final

from moeserve.checkpoints.formats.fp4 import Fp4
from moeserve.checkpoints.formats.number_format import EXPONENTS, FLOATS, Block, NumberFormat
from moeserve.checkpoints.formats.scaled import Scaled
from moeserve.checkpoints.formats.scheme import Scheme, Settings, is_size, mentions, module_of
from moeserve.config import MAX_SIZE

#: as transformers writes them, as AutoFP8 does, as DeepSeek-V4 is published, as Mistral Large 4 is
_SCALES: Final = ("{name}_scale_inv", "{name}_scale", "{module}.scale", "{module}.qscale_weight")
#: one scale for all rows and columns
_WHOLE: Final[Block] = (None, None)
_KNOWN: Final = ("activation_scale", "input_scale", "qscale_act")


def fine_grained(settings: Settings, config: Settings) -> Scheme:
    """`quant_method: "fp8"`: blocks of `weight_block_size`, or one scale for a whole tensor where that is null.

    Scales are numbers, or exponents in one byte where `scale_fmt` is "ue8m0" (DeepSeek-V3.1 and later; MXFP8 has blocks of 1 x 32).
    `expert_dtype: "fp4"`: experts are FP4 in groups of 32 (DeepSeek-V4).
    """
    scale_format = settings.get("scale_fmt")
    if scale_format not in (None, "float", "ue8m0"):
        raise ValueError(f"quantization_config.scale_fmt is {scale_format!r}; allowed: 'float' or 'ue8m0'")
    expert_dtype = settings.get("expert_dtype", config.get("expert_dtype")) or "fp8"
    if expert_dtype not in ("fp8", "fp4"):
        raise ValueError(f"expert_dtype is {expert_dtype!r}; allowed: 'fp8' or 'fp4'")
    scale_types = FLOATS if scale_format == "float" else (*FLOATS, *EXPONENTS)
    block = _block(settings)

    def recipe(name: str, index: Container[str]) -> NumberFormat | None:
        scales = scales_of(name, index)
        if scales is None:
            return None
        if expert_dtype == "fp4" and ".experts." in name:
            return Fp4(name, scales, types=("I8", "U8"), known=known_of(name))
        # AutoFP8 writes `weight_scale`, one for a whole tensor, and says nothing of blocks.
        unsaid = _WHOLE if scales == f"{name}_scale" else (128, 128)
        return Scaled(name, scales, block or unsaid, scale_types=scale_types, known=known_of(name))

    return Scheme(lambda module: recipe, mentions(settings.get("modules_to_not_convert") or settings.get("ignored_layers")), "fp8")


def fbgemm(settings: Settings, config: Settings) -> Scheme:
    """`quant_method: "fbgemm_fp8"`: one scale for each output channel; of stacks [E, in, out], as Llama 4 has them, these are columns."""

    def recipe(name: str, index: Container[str]) -> NumberFormat | None:
        if f"{name}_scale" not in index:
            return None
        block = (1, None) if name.endswith(".weight") else (None, 1)
        return Scaled(name, f"{name}_scale", block, scale_types=FLOATS, known=(f"{module_of(name)}.input_scale_ub",))

    return Scheme(lambda module: recipe, mentions(settings.get("modules_to_not_convert")), "fbgemm_fp8")


def scales_of(name: str, index: Container[str]) -> str | None:
    """The first of the names that scales of FP8 weights have."""
    names = (pattern.format(name=name, module=module_of(name)) for pattern in _SCALES)
    return next((scales for scales in names if scales in index), None)


def known_of(name: str) -> tuple[str, ...]:
    """Scales of activations, which do not matter where only weights are in FP8."""
    return tuple(f"{module_of(name)}.{known}" for known in _KNOWN)


def _block(settings: Settings) -> Block | None:
    """Rows and columns that share a scale; None: that is not said."""
    if "weight_block_size" not in settings:
        return None
    block = settings["weight_block_size"]
    if block is None:
        return _WHOLE
    if not isinstance(block, list) or len(block) != 2 or not all(map(is_size, block)):
        raise ValueError(f"quantization_config.weight_block_size is {block}; allowed: two positive whole numbers, at most {MAX_SIZE}")
    return block[0], block[1]
