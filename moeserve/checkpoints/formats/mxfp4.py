"""MXFP4 as gpt-oss is published: `_blocks` and `_scales` in stacks of experts."""

from __future__ import annotations

from collections.abc import Container

from moeserve.checkpoints.formats.fp4 import Fp4
from moeserve.checkpoints.formats.number_format import NumberFormat
from moeserve.checkpoints.formats.scheme import Scheme, Settings, mentions


def gpt_oss(settings: Settings, config: Settings) -> Scheme:
    """`quant_method: "mxfp4"`."""
    return Scheme(lambda module: blocks, mentions(settings.get("modules_to_not_convert")), "mxfp4")


def blocks(name: str, index: Container[str]) -> NumberFormat | None:
    """Layouts name the blocks themselves, which stand the other way round than the stack they are made of."""
    if name not in index or not name.endswith("_blocks"):
        return None
    return Fp4(name, f"{name.removesuffix('_blocks')}_scales", has_blocks=True)
