"""GPTQ (Frantar et al. 2022, arXiv 2210.17323) as AutoGPTQ and GPTQModel write it."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch

from moeserve.checkpoints.formats.bits import WIDTHS, covering, unpacked
from moeserve.checkpoints.formats.coded import Coded
from moeserve.checkpoints.formats.number_format import FLOATS, NumberFormat, Piece, Read
from moeserve.checkpoints.formats.packed import Packed
from moeserve.checkpoints.formats.pattern import matches, required
from moeserve.checkpoints.formats.scheme import Recipe, Scheme, Settings, mentions, module_of, positive

_RULES: Final = "quantization_config.dynamic"


@dataclass(frozen=True)
class PackedInputs(Packed):
    """qweight [C / 8, R], qzeros [G, R / 8], scales [G, R], g_idx [C], at 4 bits: words go along the inputs, the columns of a weight.

    is_v1: the zero in the file is one less than the one that is meant.
    """

    is_v1: bool = True

    is_turned: ClassVar[bool] = True

    @property
    def title(self) -> str:
        return f"GPTQ int{self.bits}"

    def pieces(self, shape: tuple[int, ...]) -> Mapping[str, Piece]:
        rows, columns = shape
        self._must_be_words(rows, columns)
        words, count, zeros = columns // self._per_word, self._count(columns), rows // self._per_word
        return {
            self.name: Piece((words, rows), ("I32",), (words, rows)),
            self.scales: Piece((count, rows), FLOATS, (count, rows)),
            self.zeros: Piece((count, zeros), ("I32",), (count, zeros)),
            **self._order_piece(columns),
        }

    def coded(self, read: Read, rows: slice, columns: slice) -> Coded:
        across, column_group = self._groups(read, columns)
        words, within = covering(columns, self._per_word)
        codes = unpacked(read(self.name, words, rows).t(), self.bits)[:, within]
        zero_words, within = covering(rows, self._per_word)
        zeros = unpacked(read(self.zeros, across, zero_words), self.bits)[:, within].t()
        if self.is_v1:
            zeros = (zeros + 1) & (2**self.bits - 1)
        scales = read(self.scales, across, rows).t().float()
        return Coded(codes, scales, torch.arange(len(scales)), column_group, zeros.float())


def gptq(settings: Settings, config: Settings) -> Scheme:
    """`quant_method: "gptq"`; `dynamic` has other settings for modules that a pattern matches ("+:") and leaves some as they are ("-:")."""
    rules = settings.get("dynamic") or {}
    if not isinstance(rules, Mapping) or not all(isinstance(change, Mapping) for change in rules.values()):
        raise ValueError("quantization_config.dynamic is not a table of patterns and their settings")
    recipes = [
        (
            required(rule.removeprefix("+:").removeprefix("-:"), _RULES),
            None if rule.startswith("-:") else _recipe({**settings, **change}),
        )
        for rule, change in rules.items()
    ]
    others = _recipe(settings)

    def recipe(module: str) -> Recipe | None:
        return next((own for pattern, own in recipes if matches(pattern, module, _RULES)), others)

    is_kept = mentions(settings.get("modules_to_not_convert"))
    are_some = bool(settings.get("modules_in_block_to_quantize"))
    return Scheme(recipe, lambda module: are_some or recipe(module) is None or is_kept(module), "gptq")


def _recipe(settings: Mapping[str, Any]) -> Recipe:
    bits, group = positive(settings, "bits"), group_size(settings)
    if bits not in WIDTHS:
        raise ValueError(f"quantization_config.bits is {bits}; supported for gptq: {', '.join(map(str, WIDTHS))}")
    has_order = bool(settings.get("desc_act")) and group is not None
    written = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    if written not in ("gptq", "gptq_v2") or settings.get("is_marlin_format"):
        raise ValueError(f"quantization_config.checkpoint_format is {written!r}; supported: gptq, gptq_v2")
    for key, usual in (("rotation", None), ("adapter", None), ("pack_dtype", "int32")):
        if settings.get(key) not in (usual, None):
            raise ValueError(f"quantization_config.{key} is {settings[key]!r}; supported: {usual or 'none'}")

    def recipe(name: str, index: Container[str]) -> NumberFormat | None:
        module = module_of(name)
        if f"{module}.qweight" not in index:
            return None
        qweight, scales, qzeros, order, bias = (f"{module}.{part}" for part in ("qweight", "scales", "qzeros", "g_idx", "bias"))
        if not has_order and order not in index:
            order = ""
        return PackedInputs(qweight, scales, bits, group, qzeros, order, (bias,), is_v1=written == "gptq")

    return recipe


def group_size(settings: Settings, key: str = "group_size") -> int | None:
    """Columns that share a scale; None: all, which files call -1."""
    return None if settings.get(key) == -1 else positive(settings, key)
