"""The grouped pass against every expert on every row, added up pair by pair, in float64.

R rows, N (row, expert) pairs, H hidden size, I intermediate size, E experts.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moeserve.config import Activation
from moeserve.experts import ExpertBank, is_gated
from moeserve.experts.ragged import Stack
from tests.closeness import assert_close
from tests.stacked import Stacked

HIDDEN_SIZE, INTERMEDIATE_SIZE = 16, 24
ACTIVATIONS: tuple[Activation, ...] = ("swiglu", "geglu", "gelu", "relu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)

#: pairs per expert: one pair; idle experts; both sides of the narrow path; every expert busy; many
COUNTS = [
    (1,),
    (0, 0, 1, 0),
    (NARROW_ROWS, NARROW_ROWS + 1, 0, 1),
    (3, 1, 4, 1, 5, 9, 2, 6),
    (300, 0, 200),
]


def some_weights(
    num_experts: int,
    activation: Activation,
    bias: bool,
    dtype: torch.dtype,
    hidden_size: int = HIDDEN_SIZE,
    intermediate_size: int = INTERMEDIATE_SIZE,
) -> Stacked:
    generator = torch.Generator().manual_seed(num_experts)
    projected = intermediate_size * (2 if is_gated(activation) else 1)

    def draw(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) / math.sqrt(shape[-1])).to(dtype)

    return Stacked(
        gate_up_proj=draw(num_experts, projected, hidden_size),
        down_proj=draw(num_experts, hidden_size, intermediate_size),
        gate_up_bias=draw(num_experts, projected) if bias else None,
        down_bias=draw(num_experts, hidden_size) if bias else None,
    )


def some_work(
    counts: tuple[int, ...], num_rows: int, dtype: torch.dtype, hidden_size: int = HIDDEN_SIZE
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden_states [R, H], row_index [N], slots [N], weights [N]; a row may be read by any number of pairs, or by none."""
    generator = torch.Generator().manual_seed(sum(counts))
    hidden_states = torch.randn(num_rows, hidden_size, generator=generator).to(dtype)
    row_index = torch.randint(num_rows, (sum(counts),), generator=generator)
    slots = torch.repeat_interleave(torch.tensor(counts))
    return hidden_states, row_index, slots, torch.rand(sum(counts), generator=generator)


def every_answer(weights: Stacked, activation: Activation, x: Tensor) -> Tensor:
    """x [R, H] float64 -> [E, R, H] float64: every expert's answer to every row, from the definition of the activation."""
    hidden = torch.einsum("egh,rh->erg", weights.gate_up_proj.double(), x)
    if weights.gate_up_bias is not None:
        hidden = hidden + weights.gate_up_bias.double()[:, None]
    intermediate_size = weights.down_proj.shape[2]
    gate, up = hidden[..., :intermediate_size], hidden[..., intermediate_size:]
    gaussian = gate * (1 + torch.erf(gate / math.sqrt(2))) / 2
    hidden = {
        "swiglu": lambda: gate / (1 + torch.exp(-gate)) * up,
        "geglu": lambda: gaussian * up,
        "gelu": lambda: gaussian,
        "relu": lambda: gate.clamp(min=0),
    }[activation]()
    answers = torch.einsum("ehi,eri->erh", weights.down_proj.double(), hidden)
    return answers if weights.down_bias is None else answers + weights.down_bias.double()[:, None]


def expected(weights: Stacked, activation: Activation, work: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    hidden_states, row_index, slots, pair_weights = work
    share = [[0.0] * len(hidden_states) for _ in range(len(weights.down_proj))]
    for row, slot, weight in zip(row_index.tolist(), slots.tolist(), pair_weights.tolist(), strict=True):
        share[slot][row] += weight
    answers = every_answer(weights, activation, hidden_states.double())
    return torch.einsum("er,erh->rh", torch.tensor(share, dtype=torch.float64), answers)


def assert_agrees(ours: Tensor, oracle: Tensor, num_pairs: int, dtype: torch.dtype) -> None:
    """A row may add up the answers of as many pairs as there are."""
    assert ours.dtype == torch.float32
    assert_close(ours, oracle, summed=4 * HIDDEN_SIZE + num_pairs, rounded_to=dtype)


def bank_of(weights: Stacked, activation: Activation, dtype: torch.dtype, device: str = "cpu") -> ExpertBank:
    return ExpertBank(weights.experts(activation), weights.down_proj.shape[1], dtype, device=torch.device(device))


def run(bank: ExpertBank, work: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    out = torch.full(work[0].shape, float("nan"))
    bank.run(*work, out=out)
    return out


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_bank_adds_up_what_its_experts_say(
    activation: Activation, bias: bool, dtype: torch.dtype, counts: tuple[int, ...], device: str
) -> None:
    weights = some_weights(len(counts), activation, bias, dtype)
    work = some_work(counts, num_rows=70, dtype=dtype)
    bank = bank_of(weights, activation, dtype, device)
    assert_agrees(run(bank, work), expected(weights, activation, work), sum(counts), dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("hidden_size", "intermediate_size"), [(7, 5), (16, 20), (12, 24)])
def test_sizes_need_not_be_round(hidden_size: int, intermediate_size: int, device: str) -> None:
    weights = some_weights(3, "swiglu", True, torch.bfloat16, hidden_size, intermediate_size)
    work = some_work((3, 0, 70), 10, torch.bfloat16, hidden_size)
    bank = bank_of(weights, "swiglu", torch.bfloat16, device)
    assert_agrees(run(bank, work), expected(weights, "swiglu", work), 73, torch.bfloat16)


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_stack_of_experts_agrees_with_the_oracle(activation: Activation, bias: bool, dtype: torch.dtype, counts: tuple[int, ...]) -> None:
    weights = some_weights(len(counts), activation, bias, dtype)
    hidden_states, row_index, _, pair_weights = work = some_work(counts, num_rows=70, dtype=dtype)
    answers = Stack(weights.experts(activation), torch.device("cpu"))(hidden_states[row_index], counts)
    out = torch.zeros(hidden_states.shape).index_add(0, row_index, answers * pair_weights[:, None])
    assert_agrees(out, expected(weights, activation, work), sum(counts), dtype)


@given(
    counts=st.lists(st.integers(0, 5), min_size=1, max_size=6).filter(any),
    num_rows=st.integers(1, 8),
    activation=st.sampled_from(ACTIVATIONS),
    bias=st.booleans(),
)
@settings(deadline=None, max_examples=50)
def test_any_share_of_pairs_and_rows(counts: list[int], num_rows: int, activation: Activation, bias: bool) -> None:
    weights = some_weights(len(counts), activation, bias, torch.float32)
    work = some_work(tuple(counts), num_rows, torch.float32)
    bank = bank_of(weights, activation, torch.float32)
    assert_agrees(run(bank, work), expected(weights, activation, work), sum(counts), torch.float32)


def test_rows_without_a_pair_are_zero() -> None:
    bank = bank_of(some_weights(2, "swiglu", True, torch.float32), "swiglu", torch.float32)
    hidden_states = torch.randn(3, HIDDEN_SIZE)
    out = run(bank, (hidden_states, torch.tensor([1]), torch.tensor([0]), torch.ones(1)))
    assert out[[0, 2]].eq(0).all()
    assert out[1].ne(0).any()


@pytest.mark.parametrize("activation_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_another_dtype_are_cast_to_that_of_the_weights(dtype: torch.dtype, activation_dtype: torch.dtype) -> None:
    weights = some_weights(4, "swiglu", False, dtype)
    hidden_states, *pairs = some_work((2, 0, 3, 1), num_rows=5, dtype=activation_dtype)
    bank = bank_of(weights, "swiglu", dtype)
    # Bit by bit here and below: one bank, so one kernel, and one number of threads (conftest.py).
    assert torch.equal(run(bank, (hidden_states, *pairs)), run(bank, (hidden_states.to(dtype), *pairs)))


def test_the_same_work_gives_the_same_bits() -> None:
    bank = bank_of(some_weights(3, "geglu", True, torch.bfloat16), "geglu", torch.bfloat16)
    work = some_work((300, 0, 200), num_rows=70, dtype=torch.bfloat16)
    assert torch.equal(run(bank, work), run(bank, work))


def test_a_bank_knows_its_number_and_size() -> None:
    bank = bank_of(some_weights(3, "relu", True, torch.float16), "relu", torch.float16)
    assert bank.num_experts == 3
    assert bank.nbytes == 2 * 3 * (2 * HIDDEN_SIZE * INTERMEDIATE_SIZE + INTERMEDIATE_SIZE + HIDDEN_SIZE)
