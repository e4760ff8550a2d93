"""What NVIDIA's Model Optimizer writes."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from typing import Any, Final

from moeserve.checkpoints.formats.fp4 import Fp4
from moeserve.checkpoints.formats.number_format import EXPONENTS, FLOATS, Block, NumberFormat
from moeserve.checkpoints.formats.scaled import Scaled
from moeserve.checkpoints.formats.scheme import Recipe, Scheme, Settings, mentions, module_of, positive

_KNOWN: Final = ("input_scale",)


def modelopt(settings: Settings, config: Settings) -> Scheme:
    """`quant_method: "modelopt"`, or hf_quant_config.json: `quant_algo` of all weights, or of each module (MIXED_PRECISION)."""
    inner = settings.get("quantization", settings)
    if not isinstance(inner, Mapping):
        raise ValueError(f"quantization_config.quantization is {inner!r}; allowed: a table")
    kept = mentions(inner.get("exclude_modules") or inner.get("ignore"))
    if str(inner.get("quant_algo")).upper() != "MIXED_PRECISION":
        # Where only what attention remembers is quantized there is no algorithm.
        recipe = None if inner.get("quant_algo") is None and "quant_algo" in inner else _recipe(inner)
        return Scheme(lambda module: recipe, kept, "modelopt")
    layers = inner.get("quantized_layers")
    if not isinstance(layers, Mapping) or not all(isinstance(layer, Mapping) for layer in layers.values()):
        raise ValueError("quantization_config.quantized_layers is not a table of modules, each with a quant_algo")
    recipes = {str(module): _recipe(layer) for module, layer in layers.items()}

    def of_module(module: str) -> Recipe | None:
        above = module
        while above and above not in recipes:
            above = above.rpartition(".")[0]
        return recipes.get(above)

    return Scheme(of_module, lambda module: of_module(module) is None or kept(module), "modelopt")


def _recipe(settings: Settings) -> Recipe:
    algorithm = str(settings.get("quant_algo")).upper()
    if algorithm not in _ALGORITHMS:
        raise ValueError(f"quantization_config.quant_algo is {settings.get('quant_algo')!r}; supported: {', '.join(_ALGORITHMS)}")
    make = _ALGORITHMS[algorithm](settings)

    def recipe(name: str, index: Container[str]) -> NumberFormat | None:
        module = module_of(name)
        if f"{module}.pre_quant_scale" in index:
            raise ValueError(f"the index has {module}.pre_quant_scale, which multiplies what goes into {module}; supported: none")
        is_here = name.endswith(".weight") and f"{name}_scale" in index
        return make(name, tuple(f"{module}.{known}" for known in _KNOWN)) if is_here else None

    return recipe


#: (name, known) -> format
_Maker = Callable[[str, tuple[str, ...]], NumberFormat]


def _fp8(block: Block, scale_types: tuple[str, ...] = FLOATS) -> Callable[[Settings], _Maker]:
    def of(settings: Settings) -> _Maker:
        return lambda name, known: Scaled(name, f"{name}_scale", block, ("F8_E4M3",), scale_types, known=known)

    return of


def _nvfp4(settings: Settings) -> _Maker:
    group = positive(settings, "group_size", 16) if settings.get("group_size") is not None else 16
    return lambda name, known: Fp4(name, f"{name}_scale", group, ("U8",), ("F8_E4M3",), f"{name}_scale_2", known=known)


_ALGORITHMS: Final[Mapping[Any, Callable[[Settings], _Maker]]] = {
    "FP8": _fp8((None, None)),
    "FP8_PER_CHANNEL_PER_TOKEN": _fp8((1, None)),
    "FP8_PB_WO": _fp8((128, 128)),
    "MXFP8": _fp8((1, 32), EXPONENTS),
    "NVFP4": _nvfp4,
    "W4A16_NVFP4": _nvfp4,
}
