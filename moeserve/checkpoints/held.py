"""Experts that are kept in the few bits they are published in: no number is rounded again.

R rows, C columns of a matrix on disk; O output and C input channels of a projection, S x G scales.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod
from typing import Final

import torch

from moeserve.checkpoints.formats import Coded, CodedFormat, Kind, NumberFormat
from moeserve.checkpoints.layouts import ExpertLayout, Part, Span
from moeserve.config import Quantization
from moeserve.errors import CheckpointError
from moeserve.experts import INT4, INT8, Code, Groups, QuantizedMatrix, float_code

_BITS: Final[Mapping[Kind, int]] = {"int8": 8, "fp8": 8, "int4": 4, "fp4": 4}


def is_held(layout: ExpertLayout, part: Part, quantization: Quantization | None) -> bool:
    """Whether this expert stays as it is stored: all of it is in few bits, and in those of `quantization` if there is one."""
    spans = layout.spans(part)
    return all(_stays(part.files.format_of(span.tensor(part)), span, quantization) for span in (*spans.gate_up, spans.down))


def held_projections(layout: ExpertLayout, part: Part) -> tuple[tuple[QuantizedMatrix, ...], QuantizedMatrix]:
    """gate_up_proj, gate first, and down_proj. Raises CheckpointError naming the file when something is not a finite number."""
    spans = layout.spans(part)
    gate_up = tuple(matrix for span in spans.gate_up for matrix in _matrices(span, part))
    (down,) = _matrices(spans.down, part)
    return gate_up, down


def held_bytes(layout: ExpertLayout, part: Part) -> int:
    """Bytes of these, known from the index and headers; it may turn out to be less where a tensor names the group of each column."""
    spans = layout.spans(part)
    return sum(_span_bytes(span, part) for span in (*spans.gate_up, spans.down))


def _stays(number_format: NumberFormat, span: Span, quantization: Quantization | None) -> bool:
    if not isinstance(number_format, CodedFormat) or quantization not in (None, number_format.kind):
        return False
    # Gate and up must not share scales.
    return not span.interleaved or number_format.block[1 if span.transposed else 0] in (1, None)


def _extent(span: Span) -> tuple[slice, slice]:
    height, width = span.shape[-2:]
    return span.rows or slice(0, height), span.columns or slice(0, width)


def _coded_format(span: Span, part: Part) -> CodedFormat:
    number_format = part.files.format_of(span.tensor(part))
    assert isinstance(number_format, CodedFormat), "asked before"
    return number_format


def _span_bytes(span: Span, part: Part) -> int:
    number_format, extent = _coded_format(span, part), _extent(span)
    rows, columns = (each.stop - each.start for each in extent)
    outputs, inputs = (columns, rows) if span.transposed else (rows, columns)
    if not outputs * inputs:
        return 0
    if number_format.has_order:
        # Any of the columns may be in any group.
        extent = (extent[0], slice(0, span.shape[-1]))
    scales = prod(
        1 if size is None else Groups(size, each.start % size).count(each.stop - each.start)
        for each, size in zip(extent, number_format.block, strict=True)
    )
    codes = outputs * -(-inputs * _BITS[number_format.kind] // 8)
    order = torch.int32.itemsize * inputs if number_format.has_order else 0
    of_group = part.files.scale_type(number_format).itemsize + number_format.has_zeros
    held: int = codes + order + scales * of_group
    return held


def _matrices(span: Span, part: Part) -> Iterator[QuantizedMatrix]:
    """One, or the two that are interleaved."""
    number_format, expert = _coded_format(span, part), part.expert if span.is_stacked else None
    coded = part.files.read_coded(span.tensor(part), span.shape, expert, *_extent(span))
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
    row_groups, column_groups = Groups.of(coded.row_group), Groups.of(coded.column_group)
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
