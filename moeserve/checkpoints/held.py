"""Experts that are kept in the few bits they are published in: no number is rounded again.

R rows, C columns of a matrix on disk; O output and C input channels of a projection, S x G scales.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod
from typing import Final

import torch

from moeserve.checkpoints.formats import Coded, CodedFormat, Kind
from moeserve.checkpoints.layouts import ExpertLayout, Span, StoredPart
from moeserve.config import Quantization
from moeserve.errors import CheckpointError
from moeserve.experts import INT4, INT8, Code, QuantizedMatrix, ScaleGroups, float_code

_BITS: Final[Mapping[Kind, int]] = {"int8": 8, "fp8": 8, "int4": 4, "fp4": 4}


def held_projections(
    layout: ExpertLayout, part: StoredPart, quantization: Quantization | None
) -> tuple[tuple[QuantizedMatrix, ...], QuantizedMatrix] | None:
    """gate_up_proj, gate first, and down_proj, as they are stored; None when they are not to be held so.

    They are where all three are in few bits, and in those of `quantization` if there is one. Raises CheckpointError naming the file when
    something is not a finite number.
    """
    stored = _stored(layout, part, quantization)
    if stored is None:
        return None
    *gate_up, down = [list(_matrices(span, number_format, part)) for span, number_format in stored]
    return tuple(matrix for matrices in gate_up for matrix in matrices), down[0]


def held_bytes(layout: ExpertLayout, part: StoredPart, quantization: Quantization | None) -> int | None:
    """Bytes of these, known from the index and headers; it may turn out to be less where a tensor names the group of each column."""
    stored = _stored(layout, part, quantization)
    return None if stored is None else sum(_span_bytes(span, number_format, part) for span, number_format in stored)


def held_title(layout: ExpertLayout, part: StoredPart, quantization: Quantization | None) -> str | None:
    """What people call the format of these."""
    stored = _stored(layout, part, quantization)
    return None if stored is None else stored[0][1].title


def _stored(layout: ExpertLayout, part: StoredPart, quantization: Quantization | None) -> list[tuple[Span, CodedFormat]] | None:
    if part.channels.start == part.channels.stop:
        return None  # a shard of a narrow expert, of which there is nothing to hold
    spans = layout.spans(part)
    found: list[tuple[Span, CodedFormat]] = []
    for span in (*spans.gate_up, spans.down):
        number_format = part.files.format_of(span.tensor(part))
        if not isinstance(number_format, CodedFormat) or quantization not in (None, number_format.kind):
            return None
        if span.interleaved and number_format.block[1 if span.transposed else 0] not in (1, None):
            return None  # gate and up share scales
        found.append((span, number_format))
    return found


def _extent(span: Span) -> tuple[slice, slice]:
    height, width = span.shape[-2:]
    return span.rows or slice(0, height), span.columns or slice(0, width)


def _span_bytes(span: Span, number_format: CodedFormat, part: StoredPart) -> int:
    rows, columns = _extent(span)
    outputs, inputs = (each.stop - each.start for each in ((columns, rows) if span.transposed else (rows, columns)))
    # In another order, any of the columns may be in any group.
    across = slice(0, span.shape[-1]) if number_format.has_order else columns
    scales = prod(_count(each, size) for each, size in zip((rows, across), number_format.block, strict=True))
    of_group = part.files.scale_type(number_format).itemsize + number_format.has_zeros
    order = torch.int32.itemsize * inputs if number_format.has_order else 0
    held: int = outputs * -(-inputs * _BITS[number_format.kind] // 8) + scales * of_group + order
    return held


def _count(part: slice, size: int | None) -> int:
    """ScaleGroups of `size` neighbors that it is in."""
    return 1 if size is None else ScaleGroups(size, part.start % size).count(part.stop - part.start)


def _matrices(span: Span, number_format: CodedFormat, part: StoredPart) -> Iterator[QuantizedMatrix]:
    """One, or the two that are interleaved."""
    coded = part.files.read_coded(span.tensor(part), span.shape, part.expert if span.is_stacked else None, *_extent(span))
    if span.transposed:
        coded = _transposed(coded)
    for each in [_every_second(coded, first) for first in range(2)] if span.interleaved else [coded]:
        matrix = _matrix(each, number_format, part.files.scale_type(number_format))
        if not matrix.is_finite():
            name = number_format.names[0]
            raise CheckpointError(f"{part.files.file_of(name)[0].path}: tensor {name} holds NaN or Inf, or its scales do")
        yield matrix


def _transposed(coded: Coded) -> Coded:
    zeros = None if coded.zeros is None else coded.zeros.t()
    rows, columns = coded.column_group, coded.row_group
    return replace(coded, codes=coded.codes.t(), scales=coded.scales.t(), zeros=zeros, row_group=rows, column_group=columns)


def _every_second(coded: Coded, first: int) -> Coded:
    """Of the rows."""
    scales, zeros = (None if each is None or len(each) == 1 else each[first::2] for each in (coded.scales, coded.zeros))
    codes = coded.codes[first::2]
    row_group = torch.arange(len(codes)) if scales is not None else coded.row_group[first::2]
    return replace(coded, codes=codes, scales=coded.scales if scales is None else scales, zeros=zeros, row_group=row_group)


def _matrix(coded: Coded, number_format: CodedFormat, scale_type: torch.dtype) -> QuantizedMatrix:
    code, codes, zeros = _signed(coded, number_format)
    row_groups, column_groups = ScaleGroups.of(coded.row_group), ScaleGroups.of(coded.column_group)
    assert row_groups is not None, "no format has rows in another order"
    return QuantizedMatrix(
        code,
        code.packed(codes),
        coded.scales.to(scale_type).contiguous(),
        codes.shape[1],
        row_groups,
        coded.column_group.to(torch.int32) if column_groups is None else column_groups,
        zeros,
        coded.factor,
    )


def _signed(coded: Coded, number_format: CodedFormat) -> tuple[Code, torch.Tensor, torch.Tensor | None]:
    """Codes [O, C], one in a byte, and zeros [S, G] int8; of whole numbers, both are moved so that they have a sign."""
    if number_format.kind in ("fp8", "fp4"):
        return float_code(coded.codes.dtype), coded.codes, None
    code = INT8 if number_format.kind == "int8" else INT4
    middle = 0 if coded.codes.dtype == torch.int8 else 2 ** (code.bits - 1)
    if coded.zeros is None or number_format.has_zeros:
        zeros = None if coded.zeros is None else (coded.zeros - middle).to(torch.int8).contiguous()
        return code, (coded.codes.to(torch.int16) - middle).to(torch.int8), zeros
    # One zero for all: that of symmetric codes.
    return code, (coded.codes.to(torch.int16) - int(coded.zeros.item())).to(torch.int8), None
