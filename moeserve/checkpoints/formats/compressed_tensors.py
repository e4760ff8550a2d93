"""What the library compressed-tensors writes (llm-compressor, Red Hat's, Kimi-K2's and many other checkpoints)."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Mapping
from typing import Any, Final

from moeserve.checkpoints.formats.bits import WIDTHS
from moeserve.checkpoints.formats.fp4 import Fp4
from moeserve.checkpoints.formats.number_format import EXPONENTS, FLOATS, Block, NumberFormat
from moeserve.checkpoints.formats.packed import PackedColumns
from moeserve.checkpoints.formats.pattern import matches, required
from moeserve.checkpoints.formats.scaled import Scaled
from moeserve.checkpoints.formats.scheme import Recipe, Scheme, Settings, is_size, mentions, module_of, positive
from moeserve.config import MAX_SIZE

#: tensors about activations, which do not matter where only weights are quantized, and the shape that config.json says too
_KNOWN: Final = ("input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point", "weight_shape")
_RE: Final = "re:"


def compressed_tensors(settings: Settings, config: Settings) -> Scheme:
    """`quant_method: "compressed-tensors"`: each of `config_groups` says which modules it targets, and how their weights are stored."""
    for key in ("sparsity_config", "transform_config"):
        table = settings.get(key) or {}
        if table and not (isinstance(table, Mapping) and table.get("format") == "dense"):
            raise ValueError(f"quantization_config.{key} is {table}; supported: none")
    status = settings.get("quantization_status", "compressed")
    if status not in ("compressed", "frozen"):
        raise ValueError(f"quantization_config.quantization_status is {status!r}; supported: 'compressed' or 'frozen'")
    groups = settings.get("config_groups")
    if not isinstance(groups, Mapping) or not all(isinstance(group, Mapping) for group in groups.values()):
        raise ValueError("quantization_config.config_groups is not a table of groups, each with targets and weights")
    ignored = _patterns(settings.get("ignore"))
    recipes = [(_patterns(group.get("targets")), _recipe(group, settings)) for group in groups.values()]

    def recipe(module: str) -> Recipe | None:
        if any(_matches(pattern, module) for pattern in ignored):
            return None
        # As the library has it: a name wins over a pattern, and that over a kind of module.
        found = [(_rank(target, module), own) for targets, own in recipes for target in targets]
        rank, own = min(found, key=lambda each: each[0], default=(_NONE, None))
        return None if rank == _NONE else own

    return Scheme(recipe, lambda module: recipe(module) is None or mentions(ignored)(module), "compressed-tensors")


_NONE: Final = 3


def _rank(target: str, module: str) -> int:
    if target == module:
        return 0
    if target.startswith(_RE) and _matches(target, module):
        return 1
    return 2 if target == "Linear" else _NONE


def _matches(pattern: str, module: str) -> bool:
    return matches(pattern.removeprefix(_RE), module) if pattern.startswith(_RE) else pattern == module


def _patterns(names: Any) -> list[str]:
    found = [str(name) for name in names or []]
    for name in found:
        if name.startswith(_RE):
            required(name.removeprefix(_RE))
    return found


def _recipe(group: Settings, settings: Settings) -> Recipe | None:
    weights, written = group.get("weights"), group.get("format") or settings.get("format")
    if weights is None:
        return None
    if not isinstance(weights, Mapping) or written not in _FORMATS:
        raise ValueError(f"quantization_config.format is {written!r}; supported for compressed-tensors: {', '.join(_FORMATS)}")
    make, primary = _FORMATS[written](weights)

    def recipe(name: str, index: Container[str]) -> NumberFormat | None:
        # Stacks of experts have no names that were agreed on.
        is_here = name.endswith(".weight") and f"{name}{primary}" in index and f"{name}_scale" in index
        return make(name, index, tuple(f"{module_of(name)}.{known}" for known in _KNOWN)) if is_here else None

    return recipe


#: (name, index, known) -> format
_Maker = Callable[[str, Container[str], tuple[str, ...]], NumberFormat]


def _block(weights: Settings) -> Block:
    size = weights.get("group_size")
    strategy = weights.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
    if strategy in ("group", "tensor_group"):
        return 1, positive(weights, "group_size")
    if strategy == "block":
        block = weights.get("block_structure")
        sizes = [int(part) for part in re.findall(r"\d+", block)] if isinstance(block, str) else block
        if not isinstance(sizes, list) or len(sizes) != 2 or not all(map(is_size, sizes)):
            raise ValueError(
                f"quantization_config has the block_structure {block!r}; allowed: two positive whole numbers, at most {MAX_SIZE}"
            )
        return sizes[0], sizes[1]
    if strategy not in ("tensor", "channel"):
        raise ValueError(f"quantization_config has weights of strategy {strategy!r}; supported: tensor, channel, group, block")
    return (None, None) if strategy == "tensor" else (1, None)


def _must_be(weights: Settings, kind: str, bits: tuple[int, ...]) -> int:
    found = positive(weights, "num_bits", 8)
    if str(weights.get("type", "int")).lower() != kind or found not in bits:
        raise ValueError(
            f"quantization_config has weights of type {weights.get('type')} with {found} bits; "
            f"supported in this format: {kind} with {', '.join(map(str, bits))}"
        )
    return found


def _naive(weights: Settings) -> tuple[_Maker, str]:
    """A number in a byte, whatever shares a scale."""
    is_float = str(weights.get("type", "int")).lower() == "float"
    _must_be(weights, "float" if is_float else "int", (8,) if is_float else tuple(range(2, 9)))
    block, types = _block(weights), (("F8_E4M3",) if is_float else ("I8",))
    scale_types = EXPONENTS if str(weights.get("scale_dtype")).endswith("uint8") else (*FLOATS, "F8_E8M0")

    def make(name: str, index: Container[str], known: tuple[str, ...]) -> NumberFormat:
        zeros = f"{name}_zero_point"
        has_zeros = zeros in index or not weights.get("symmetric", True)
        return Scaled(name, f"{name}_scale", block, types, scale_types, zeros if has_zeros else "", known)

    return make, ""


def _mxfp8(weights: Settings) -> tuple[_Maker, str]:
    _must_be(weights, "float", (8,))
    block = _block(weights)
    return lambda name, index, known: Scaled(name, f"{name}_scale", block, ("F8_E4M3",), EXPONENTS, known=known), ""


def _packed(weights: Settings) -> tuple[_Maker, str]:
    bits = _must_be(weights, "int", WIDTHS)
    down, across = _block(weights)
    is_symmetric, has_order = weights.get("symmetric", True), weights.get("actorder") in ("group", "dynamic")
    if down not in (1, None) or (down is None and not is_symmetric):
        raise ValueError("quantization_config has packed weights in blocks, or with one zero for a tensor; supported: by channel or group")

    def make(name: str, index: Container[str], known: tuple[str, ...]) -> NumberFormat:
        order = f"{name}_g_idx" if has_order or f"{name}_g_idx" in index else ""
        zeros = "" if is_symmetric else f"{name}_zero_point"
        return PackedColumns(f"{name}_packed", f"{name}_scale", bits, across, zeros, order, known, is_whole=down is None)

    return make, "_packed"


def _nvfp4(weights: Settings) -> tuple[_Maker, str]:
    _must_be(weights, "float", (4,))
    group = positive(weights, "group_size", 16)

    def make(name: str, index: Container[str], known: tuple[str, ...]) -> NumberFormat:
        scale_types, one = ("F8_E4M3",), f"{name}_global_scale"
        return Fp4(f"{name}_packed", f"{name}_scale", group, ("U8",), scale_types, one, divides=True, known=known)

    return make, "_packed"


def _mxfp4(weights: Settings) -> tuple[_Maker, str]:
    _must_be(weights, "float", (4,))
    group = positive(weights, "group_size", 32)
    return lambda name, index, known: Fp4(f"{name}_packed", f"{name}_scale", group, known=known), "_packed"


_FORMATS: Final[Mapping[Any, Callable[[Settings], tuple[_Maker, str]]]] = {
    "pack-quantized": _packed,
    "int-quantized": _naive,
    "float-quantized": _naive,
    "naive-quantized": _naive,
    "mxfp8-quantized": _mxfp8,
    "nvfp4-pack-quantized": _nvfp4,
    "mxfp4-pack-quantized": _mxfp4,
}
