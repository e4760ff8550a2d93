"""Tensors and their bytes: the same both ways, without a copy, and no more than was promised."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeserve import InvalidRequest
from moeserve.api.tensors import FLOAT_DTYPES, WIRE_DTYPES, WIRE_NUMBERS, dtype_name, nbytes, raw, view

DTYPES = list(WIRE_DTYPES.values())
SHAPES = st.lists(st.integers(0, 4), max_size=4)


@given(shape=SHAPES, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
@settings(deadline=None)
def test_bytes_and_back(shape: list[int], dtype: torch.dtype, seed: int) -> None:
    tensor = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 10).to(dtype)
    data = bytes(raw(tensor))
    assert len(data) == nbytes(shape, dtype) == tensor.nbytes
    back = view(data, shape, dtype)
    assert back.dtype == dtype
    assert torch.equal(back, tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes_are_those_of_numpy_little_endian(dtype: torch.dtype) -> None:
    tensor = torch.arange(-3, 4).to(dtype)
    if dtype == torch.bfloat16:
        expected = (tensor.float().numpy().view("<u4") >> 16).astype("<u2").tobytes()
    else:
        expected = tensor.numpy().astype(tensor.numpy().dtype.newbyteorder("<")).tobytes()
    assert bytes(raw(tensor)) == expected


def test_nothing_is_copied() -> None:
    tensor = torch.arange(6.0)
    memory = raw(tensor)
    tensor[0] = 7
    assert memory[:4].tobytes() == torch.tensor([7.0]).numpy().tobytes()
    data = bytearray(8)
    seen = view(data, [2], torch.float32)
    data[:] = torch.tensor([1.0, 2.0]).numpy().tobytes()
    assert seen.tolist() == [1, 2]


def test_rows_apart_and_gradients_do_not_matter() -> None:
    tensor = torch.arange(12.0).view(3, 4).requires_grad_()[:, ::2]
    assert torch.equal(view(bytes(raw(tensor)), [3, 2], torch.float32), torch.tensor([[0.0, 2], [4, 6], [8, 10]]))


@pytest.mark.parametrize(
    ("num_bytes", "shape"),
    [
        (8, [3]),
        (8, [1]),
        (8, []),
        (0, [1]),
        (8, [0]),
        (8, [-2]),
        (8, [-1, -2]),
        (0, [0, -1]),
        (8, [2**62, 2**62]),
        (0, [2**40, 2**40, 0]),
        (0, [2**64, 0]),
    ],
)
@pytest.mark.parametrize("kind", [bytes, bytearray, lambda size: memoryview(bytes(size))], ids=["bytes", "bytearray", "memoryview"])
def test_a_shape_that_does_not_fit_the_bytes_is_refused(num_bytes: int, shape: list[int], kind: type[bytes]) -> None:
    with pytest.raises(InvalidRequest, match=r"hidden_states has \d bytes, but shape .* of float32") as caught:
        view(kind(num_bytes), shape, torch.float32, "hidden_states")
    assert caught.value.violations[0].field == "hidden_states"


def test_names_and_numbers() -> None:
    assert [dtype_name(dtype) for dtype in FLOAT_DTYPES.values()] == list(FLOAT_DTYPES)
    assert {WIRE_NUMBERS[dtype]: dtype for dtype in DTYPES} == WIRE_DTYPES
