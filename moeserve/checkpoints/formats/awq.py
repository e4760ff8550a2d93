"""AWQ (Lin et al. 2023, arXiv 2306.00978) as AutoAWQ writes it for its "gemm" kernels."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

import torch

from moeserve.checkpoints.formats.bits import covering, unpacked
from moeserve.checkpoints.formats.coded import Coded, groups
from moeserve.checkpoints.formats.gptq import group_size
from moeserve.checkpoints.formats.number_format import FLOATS, NumberFormat, Piece, Read
from moeserve.checkpoints.formats.packed import Packed
from moeserve.checkpoints.formats.scheme import Scheme, Settings, mentions, module_of

#: AutoAWQ and GPTQModel have names of their own for the same settings
_SERVED: Final = {"bits": 4, "w_bit": 4, "zero_point": True, "version": "gemm", "format": "gemm", "checkpoint_format": "gemm"}


@dataclass(frozen=True)
class PackedOutputs(Packed):
    """qweight [C, R / 8], qzeros [G, R / 8], scales [G, R]: words go along the outputs, the rows of a weight, even ones first."""

    title = "AWQ int4"
    is_turned: ClassVar[bool] = True

    def pieces(self, shape: tuple[int, ...]) -> Mapping[str, Piece]:
        rows, columns = shape
        self._must_be_words(rows, self._per_word)
        words, count = rows // self._per_word, self._count(columns)
        return {
            self.name: Piece((columns, words), ("I32",), (columns, words)),
            self.scales: Piece((count, rows), FLOATS, (count, rows)),
            self.zeros: Piece((count, words), ("I32",), (count, words)),
        }

    def coded(self, read: Read, rows: slice, columns: slice) -> Coded:
        across, column_group = groups(columns, self.group)
        words, within = covering(rows, self._per_word)
        codes = self._in_order(read(self.name, columns, words))[:, within].t().contiguous()
        zeros = self._in_order(read(self.zeros, across, words))[:, within].t()
        scales = read(self.scales, across, rows).t().float()
        return Coded(codes, scales, torch.arange(len(scales)), column_group, zeros.float())

    def _in_order(self, words: torch.Tensor) -> torch.Tensor:
        """[n, W] words -> [n, 8 W] codes; of eight neighbors a word has those with even numbers first."""
        codes = unpacked(words, self.bits)
        return codes.view(*words.shape, 2, 4).transpose(2, 3).reshape(codes.shape)


def awq(settings: Settings, config: Settings) -> Scheme:
    """`quant_method: "awq"`, 4 bits with zeros, in the order of its gemm kernels."""
    for key, served in _SERVED.items():
        found = settings.get(key, served)
        if found is not None and (found.lower() if isinstance(found, str) else found) != served:
            raise ValueError(f"quantization_config.{key} is {found!r}; supported for awq: {served!r}")
    group = group_size(settings, "q_group_size" if "q_group_size" in settings else "group_size")

    def recipe(name: str, index: Container[str]) -> NumberFormat | None:
        module = module_of(name)
        if f"{module}.qweight" not in index:
            return None
        return PackedOutputs(f"{module}.qweight", f"{module}.scales", 4, group, f"{module}.qzeros")

    return Scheme(lambda module: recipe, mentions(settings.get("modules_to_not_convert")), "awq")
