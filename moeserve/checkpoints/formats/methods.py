"""The table of published formats: what `quantization_config` of config.json can be."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from typing import Final

from moeserve.checkpoints.formats import fp8, mxfp4
from moeserve.checkpoints.formats.awq import awq
from moeserve.checkpoints.formats.compressed_tensors import compressed_tensors
from moeserve.checkpoints.formats.gptq import gptq
from moeserve.checkpoints.formats.modelopt import modelopt
from moeserve.checkpoints.formats.number_format import NumberFormat
from moeserve.checkpoints.formats.scheme import Scheme, Settings

#: `quant_method` -> what its settings (and the rest of config.json) say
METHODS: Final[Mapping[str, Callable[[Settings, Settings], Scheme]]] = {
    "fp8": fp8.fine_grained,
    "fbgemm_fp8": fp8.fbgemm,
    "mxfp4": mxfp4.gpt_oss,
    "compressed-tensors": compressed_tensors,
    "gptq": gptq,
    "awq": awq,
    "modelopt": modelopt,
    "modelopt_fp4": modelopt,
    "modelopt_mxfp8": modelopt,
}


def scheme_of(settings: object, config: Settings) -> Scheme:
    """What a `quantization_config`, None = there is none, says beside the rest of config.json.

    Raises ValueError with one sentence that names the key.
    """
    if settings is None:
        return UNSAID
    if not isinstance(settings, Mapping):
        raise ValueError(f"quantization_config is {settings!r}; allowed: a table")
    method = settings.get("quant_method")
    if method is None and "weight_block_size" in settings:
        return fp8.fine_grained(settings, config)
    served = METHODS.get(method.lower()) if isinstance(method, str) else None
    if served is None:
        raise ValueError(f"quantization_config.quant_method is {method!r}; supported: {', '.join(METHODS)}")
    return served(settings, config)


def _by_names(name: str, index: Container[str]) -> NumberFormat | None:
    """Blocks of 128 x 128 in FP8, and MXFP4, are told by the names of their scales alone."""
    if f"{name}_scale_inv" in index:
        return fp8.fine_grained({}, {}).format_of(name, index)
    return mxfp4.blocks(name, index)


#: config.json has no quantization_config
UNSAID: Final = Scheme(lambda module: _by_names, lambda module: True, "config.json without quantization_config")
