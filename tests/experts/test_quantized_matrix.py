"""A projection in few bits against its definition, decoded by NumPy number by number, and a product in float64.

n rows, O output and C input channels, S x G scales.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moeserve.experts import INT4, INT8, Code, QuantizedMatrix, ScaleGroups, float_code
from moeserve.experts.decoding import CompiledDecoder, TorchDecoder
from moeserve.kernels import can_decode
from tests.support.closeness import assert_close

FP8_TYPES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
FP4 = float_code(torch.uint8)
CODES = [INT8, INT4, FP4, *map(float_code, FP8_TYPES)]
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
SCALE_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu, torch.float8_e4m3fn)


def value(code: Code, bits: int) -> float:
    """Of one code, from sign, exponent and fraction."""
    if code in (INT8, INT4):
        return bits - 2**code.bits if bits >= 2 ** (code.bits - 1) else bits
    if code is FP4:
        return -FP4_VALUES[bits & 7] if bits & 8 else FP4_VALUES[bits & 7]
    mantissa_bits, bias = {"e4m3fn": (3, 7), "e5m2": (2, 15), "e4m3fnuz": (3, 8), "e5m2fnuz": (2, 16)}[str(code.dtype).partition("_")[2]]
    exponent, mantissa = (bits & 127) >> mantissa_bits, (bits & (2**mantissa_bits - 1)) / 2**mantissa_bits
    magnitude = (1 + mantissa) * 2.0 ** (exponent - bias) if exponent else mantissa * 2.0 ** (1 - bias)
    return -magnitude if bits & 128 else magnitude


def numbers_of(code: Code) -> np.ndarray:
    """[256] or [16] float64; 0 for what is no number."""
    return np.array([0 if bits in code.broken else value(code, bits) for bits in range(2**code.bits)])


def decoded(
    code: Code, codes: np.ndarray, row_group: np.ndarray, column_group: np.ndarray, scales: np.ndarray, zeros: np.ndarray
) -> np.ndarray:
    """[O, C] float64."""
    exact = np.empty(codes.shape)
    for row, column in np.ndindex(*codes.shape):
        at = row_group[row], column_group[column]
        exact[row, column] = (numbers_of(code)[codes[row, column]] - zeros[at]) * scales[at]
    return exact


@st.composite
def matrices(draw: st.DrawFn) -> tuple[QuantizedMatrix, np.ndarray]:
    """Of any code, shape, groups and scales; with the numbers it stands for."""
    code = draw(st.sampled_from(CODES))
    shape = draw(st.integers(0, 7)), draw(st.integers(0, 40))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    sizes = draw(st.sampled_from([1, 2, 3, 7, 50])), draw(st.sampled_from([1, 2, 3, 4, 5, 8, 50]))
    rows, columns = (ScaleGroups(size, draw(st.integers(0, size - 1))) for size in sizes)
    of_column = columns.index(0, shape[1])
    column_groups: ScaleGroups | Tensor = columns
    if draw(st.booleans()):
        column_groups = of_column = torch.from_numpy(generator.permutation(of_column.numpy())).to(torch.int32)
    size = rows.count(shape[0]), columns.count(shape[1])
    codes = generator.integers(0, 2**code.bits, shape).astype(np.uint8)
    codes[np.isin(codes, sorted(code.broken))] = 0
    scale_type = draw(st.sampled_from(SCALE_TYPES))
    scales = torch.from_numpy(2.0 ** generator.integers(-6, 6, size) * (1 if scale_type == torch.float8_e8m0fnu else 1.125)).to(scale_type)
    has_zeros = code in (INT8, INT4) and draw(st.booleans())
    zeros = torch.from_numpy(generator.integers(-8, 9, size).astype(np.int8)) if has_zeros else None
    factor = draw(st.sampled_from([1.0, 0.25]))
    held = code.packed(torch.from_numpy(codes))
    matrix = QuantizedMatrix(code, held.view(code.dtype), scales, shape[1], rows, column_groups, zeros, factor)
    plain_zeros = np.zeros(size) if zeros is None else zeros.numpy()
    groups = rows.index(0, shape[0]).numpy(), of_column.numpy()
    return matrix, decoded(code, codes, *groups, scales.double().numpy() * factor, plain_zeros)


@given(drawn=matrices(), num_rows=st.sampled_from([1, 2, 8, 9, 20]), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
@settings(deadline=None, max_examples=300)
def test_any_matrix(drawn: tuple[QuantizedMatrix, np.ndarray], num_rows: int, dtype: torch.dtype) -> None:
    matrix, exact = drawn
    assert matrix.is_finite()
    numbers = matrix.dequantized()
    assert numbers.dtype == torch.float32
    np.testing.assert_allclose(numbers.double().numpy(), exact, rtol=2**-22, atol=0)
    rows = torch.randn(num_rows, 2 * matrix.columns, generator=torch.Generator().manual_seed(0)).to(dtype)[:, ::2]
    answer = matrix.project(rows)
    assert answer.dtype == torch.float32
    expected = rows.double().numpy() @ exact.T
    # What the type of the products rounds, in each product and each sum: relative to the sum of their magnitudes.
    eps = torch.finfo(torch.float32 if num_rows <= 8 else dtype).eps
    bound = np.abs(rows.double().numpy()) @ np.abs(exact).T * eps * (2 + np.log2(1 + matrix.columns))
    assert (np.abs(answer.double().numpy() - expected) <= bound + 1e-30).all()


@given(drawn=matrices(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
@settings(deadline=None, max_examples=200)
def test_both_decoders(drawn: tuple[QuantizedMatrix, np.ndarray], dtype: torch.dtype) -> None:
    matrix, exact = drawn
    decoders = [TorchDecoder(matrix)]
    if matrix.code.compiled is not None and can_decode():
        decoders.append(CompiledDecoder(matrix))
    for decoder in decoders:
        for first, last in [(0, 2), (2, 7)]:
            tile = matrix.code.together(decoder.tile(first, last, dtype), matrix.columns)
            assert tile.dtype == dtype
            after = 1.0 if decoder.after is None else decoder.after[first:last].double().numpy()
            rows = torch.randn(3, matrix.columns, generator=torch.Generator().manual_seed(0))
            sums = decoder.few(matrix.code.apart(rows)) if decoder.after is None else decoder.few(matrix.code.apart(rows)) * decoder.after
            assert_close(sums.t(), rows.double() @ torch.from_numpy(exact).t(), summed=matrix.columns)
            # Rounded once, to the type of the rows; scales that wait are exact.
            bound = torch.finfo(dtype).eps / 2 + 2**-22
            np.testing.assert_allclose(tile.double().numpy() * after, exact[first:last], rtol=bound, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("code", CODES, ids=lambda code: code.name)
def test_every_code_is_decoded_exactly(code: Code, dtype: torch.dtype) -> None:
    bits = [bits for bits in range(2**code.bits) if bits not in code.broken]
    codes = code.packed(torch.tensor(bits, dtype=torch.uint8)[:, None]).view(code.dtype)
    matrix = QuantizedMatrix(code, codes, torch.ones(len(bits), 1), 1, ScaleGroups(1), ScaleGroups(1))
    expected = torch.tensor([value(code, each) for each in bits])
    for num_rows in (1, 20):
        assert torch.equal(matrix.project(torch.ones(num_rows, 1, dtype=dtype)), expected.expand(num_rows, -1))
    assert torch.equal(matrix.dequantized()[:, 0], expected)


@pytest.mark.parametrize("code", CODES, ids=lambda code: code.name)
def test_a_code_that_is_no_number_is_noticed(code: Code) -> None:
    for bits in code.broken:
        codes = torch.zeros(3, 8, dtype=torch.uint8)
        codes[1, 5] = bits
        assert not code.are_finite(codes.view(code.dtype))
    assert code.are_finite(torch.zeros(3, 8, dtype=torch.uint8).view(code.dtype))
    assert bool(code.broken) == (code.bits == 8 and code is not INT8)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 3e38, 2.0**121])
def test_scales_that_make_no_numbers_are_noticed(scale: float) -> None:
    codes = torch.tensor([[0, 7, 112]], dtype=torch.uint8)
    matrix = QuantizedMatrix(
        float_code(torch.float8_e4m3fn), codes.view(torch.float8_e4m3fn), torch.tensor([[scale]]), 3, ScaleGroups(1), ScaleGroups(3)
    )
    assert not matrix.is_finite()


@pytest.mark.parametrize("byte", [0x7F, 0xFF])
def test_scales_in_fp8_that_are_no_numbers_are_noticed(byte: int) -> None:
    """As those of NVFP4."""
    codes, scales = torch.full((2, 16), 0x22, dtype=torch.uint8), torch.full((2, 2), 0x38, dtype=torch.uint8)
    matrix = QuantizedMatrix(FP4, codes, scales.view(torch.float8_e4m3fn), 32, ScaleGroups(1), ScaleGroups(16))
    assert matrix.is_finite()
    scales[1, 0] = byte
    assert not matrix.is_finite()


@pytest.mark.parametrize("columns", [32, 64])
def test_the_largest_scales(columns: int) -> None:
    """Of FP4: powers of two up to 2^127, beside which little is finite."""
    codes, scales = torch.full((2, columns // 2), 0x11, dtype=torch.uint8), torch.full((2, columns // 32), 2.0**127)
    matrix = QuantizedMatrix(FP4, codes, scales.to(torch.float8_e8m0fnu), columns, ScaleGroups(1), ScaleGroups(32))
    assert matrix.is_finite()
    for decoder in [TorchDecoder(matrix), *([CompiledDecoder(matrix)] if can_decode() else [])]:
        for dtype in (torch.float32, torch.bfloat16):
            numbers = decoder.tile(0, 2, dtype)
            assert (numbers if decoder.after is None else numbers * decoder.after).eq(2.0**126).all()


def test_large_matrices_are_decoded_in_tiles_that_meet() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (1500, 512), dtype=torch.uint8, generator=generator)
    scales = torch.rand(1500, 1024 // 32, generator=generator)
    matrix = QuantizedMatrix(FP4, codes, scales, 1024, ScaleGroups(1), ScaleGroups(32))
    for num_rows in (3, 40):
        rows = torch.randn(num_rows, 1024, generator=generator)
        expected = rows.double() @ matrix.dequantized().double().t()
        assert (matrix.project(rows).double() - expected).norm() <= 1e-6 * expected.norm()


@given(size=st.integers(1, 9), cut=st.integers(0, 8), length=st.integers(0, 40))
def test_groups_are_found_again(size: int, cut: int, length: int) -> None:
    index = ScaleGroups(size, cut % size).index(0, length)
    found = ScaleGroups.of(index)
    assert found is not None
    assert torch.equal(found.index(0, length), index)
    assert found.count(length) == (int(index.max()) + 1 if length else 0)


def test_no_groups_of_neighbors() -> None:
    assert ScaleGroups.of(torch.tensor([0, 1, 0, 1])) is None
    assert ScaleGroups.of(torch.tensor([0, 0, 1, 2, 2])) is None
