"""The grouped pass against every expert on every row, added up pair by pair, in float64: by every kernel there is here."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeserve.config import Activation, Bits, Kernel
from moeserve.experts import Expert, ExpertBank, FeedForward, ModuleExpert, quantize
from moeserve.experts.pairs import Pairs
from moeserve.experts.ragged import ExpertStacks, Stack
from tests.experts.oracle import (
    ACTIVATIONS,
    CASES,
    COUNTS,
    DTYPES,
    HIDDEN_SIZE,
    INTERMEDIATE_SIZE,
    assert_agrees,
    bank_of,
    every_answer,
    expected,
    kernels,
    run,
    some_weights,
    some_work,
)
from tests.support.closeness import assert_close
from tests.support.stacked import Stacked


@pytest.mark.parametrize(("device", "dtype", "kernel"), CASES, ids=str)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_bank_adds_up_what_its_experts_say(
    activation: Activation, bias: bool, counts: tuple[int, ...], device: str, dtype: torch.dtype, kernel: Kernel
) -> None:
    weights = some_weights(len(counts), activation, bias, dtype)
    work = some_work(counts, num_rows=70, dtype=dtype)
    bank = bank_of(weights, activation, dtype, device, kernel)
    assert_agrees(run(bank, work), expected(weights, activation, work), sum(counts), dtype)


@pytest.mark.parametrize(("device", "dtype", "kernel"), CASES, ids=str)
@pytest.mark.parametrize(("hidden_size", "intermediate_size"), [(7, 5), (33, 64), (64, 100), (1000, 40), (96, 700)])
def test_sizes_need_not_be_round(hidden_size: int, intermediate_size: int, device: str, dtype: torch.dtype, kernel: Kernel) -> None:
    weights = some_weights(3, "swiglu", True, dtype, hidden_size, intermediate_size)
    work = some_work((3, 0, 70), 10, dtype, hidden_size)
    bank = bank_of(weights, "swiglu", dtype, device, kernel)
    assert_close(run(bank, work), expected(weights, "swiglu", work), summed=2 * hidden_size + intermediate_size + 73, rounded_to=dtype)


@pytest.mark.parametrize(("device", "dtype", "kernel"), CASES, ids=str)
def test_experts_of_several_sizes_and_one_without_channels(device: str, dtype: torch.dtype, kernel: Kernel) -> None:
    sizes = (24, 0, 64, 130)
    parts = [some_weights(1, "swiglu", True, dtype, HIDDEN_SIZE, size) if size else None for size in sizes]
    nothing = FeedForward("swiglu", torch.empty(0, HIDDEN_SIZE, dtype=dtype), torch.empty(HIDDEN_SIZE, 0, dtype=dtype))
    experts = [nothing if part is None else part.experts("swiglu")[0] for part in parts]
    hidden_states, row_index, local_experts, pair_weights = work = some_work((3, 2, 40, 1), 20, dtype)
    oracle = torch.zeros(20, HIDDEN_SIZE, dtype=torch.float64)
    for slot, part in enumerate(parts):
        if part is not None:
            own = local_experts == slot
            oracle += expected(part, "swiglu", (hidden_states, row_index[own], torch.zeros_like(local_experts[own]), pair_weights[own]))
    out = run(ExpertBank(experts, HIDDEN_SIZE, dtype, device=torch.device(device), kernel=kernel), work)
    assert_close(out, oracle, summed=2 * HIDDEN_SIZE + 130 + 46, rounded_to=dtype)


@pytest.mark.parametrize("rows", [1, 2, 33])
@pytest.mark.parametrize("bits", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_quantized_shard_without_channels_adds_nothing(dtype: torch.dtype, bits: Bits, rows: int) -> None:
    stored = torch.int8 if bits == "int8" else torch.float8_e4m3fn
    nothing = FeedForward("swiglu", torch.empty(0, HIDDEN_SIZE, dtype=dtype), torch.empty(HIDDEN_SIZE, 0, dtype=dtype))
    for kernel in kernels(dtype, stored):
        bank = ExpertBank([quantize(nothing, bits)], HIDDEN_SIZE, dtype, kernel=kernel)
        assert not run(bank, some_work((rows,), rows, dtype)).any(), kernel


@pytest.mark.parametrize(("device", "dtype", "kernel"), CASES, ids=str)
def test_weights_of_what_goes_in_and_a_shared_expert(device: str, dtype: torch.dtype, kernel: Kernel) -> None:
    weights, shared = some_weights(2, "swiglu", False, dtype), some_weights(1, "swiglu", False, dtype, HIDDEN_SIZE, 40)
    hidden_states, row_index, local_experts, pair_weights = work = some_work((5, 3, 9), 9, dtype)
    sides = {"shared": shared.experts("swiglu")[0], "device": torch.device(device), "scale_inputs": True, "kernel": kernel}
    bank = ExpertBank(weights.experts("swiglu"), HIDDEN_SIZE, dtype, **sides)
    rounded = pair_weights.to(dtype)
    oracle = torch.zeros(9, HIDDEN_SIZE, dtype=torch.float64)
    for row, slot, rounded_weight, weight in zip(row_index.tolist(), local_experts.tolist(), rounded, pair_weights, strict=True):
        own, x = hidden_states[row : row + 1], weight.double()
        if slot < 2:
            own, x = own * rounded_weight, torch.ones((), dtype=torch.float64)
        answers = every_answer(weights if slot < 2 else shared, "swiglu", own.double())
        oracle[row] += x * answers[slot if slot < 2 else 0, 0]
    assert_close(run(bank, work), oracle, summed=4 * HIDDEN_SIZE + 17, rounded_to=dtype)


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_stack_of_experts_agrees_with_the_oracle(activation: Activation, bias: bool, dtype: torch.dtype, counts: tuple[int, ...]) -> None:
    weights = some_weights(len(counts), activation, bias, dtype)
    hidden_states, row_index, _, pair_weights = work = some_work(counts, num_rows=70, dtype=dtype)
    out = torch.empty(hidden_states.shape)
    stacks = ExpertStacks(len(counts), torch.device("cpu"))
    stack = Stack([stacks.place(expert) for expert in weights.experts(activation)])
    stack.run(hidden_states, Pairs(row_index, np.array(counts), None, pair_weights), out, False)
    assert_agrees(out, expected(weights, activation, work), sum(counts), dtype)


def test_a_stack_is_what_all_its_experts_lie_in_and_a_copy_of_some_of_them_or_in_another_order() -> None:
    """A part of a stack would keep the memory of all of it."""
    weights = some_weights(4, "swiglu", True, torch.bfloat16)
    stacks = ExpertStacks(4, torch.device("cpu"))
    placed = [stacks.place(expert) for expert in weights.experts("swiglu")]
    for chosen, is_shared in (([0, 1, 2, 3], True), ([1, 2, 3], False), ([0, 1, 2], False), ([3, 2, 1, 0], False)):
        counts = (3, 0, 5, 2)[: len(chosen)]
        hidden_states, row_index, _, pair_weights = work = some_work(counts, num_rows=7, dtype=torch.bfloat16)
        stack, out = Stack([placed[expert] for expert in chosen]), torch.empty(hidden_states.shape)
        stack.run(hidden_states, Pairs(row_index, np.array(counts), None, pair_weights), out, False)
        own = Stacked(*(None if tensor is None else tensor[chosen] for tensor in weights))  # type: ignore[arg-type]
        assert_agrees(out, expected(own, "swiglu", work), sum(counts), torch.bfloat16)
        for held, expert in zip(stack.held, chosen, strict=True):
            mine, theirs = held.expert().down_proj, placed[expert].expert().down_proj
            assert torch.equal(mine, theirs)
            assert (mine.data_ptr() == theirs.data_ptr()) is is_shared


@pytest.mark.parametrize("kernel", kernels(torch.float32))
def test_kinds_that_are_not_computed_together_add_up(kernel: Kernel) -> None:
    """Whatever their order: what is computed in one pass, in another, and by itself."""
    parts = [some_weights(1, "swiglu", True, torch.float32), some_weights(2, "geglu", True, torch.float32)]
    experts: list[Expert] = [*parts[0].experts("swiglu"), ModuleExpert(torch.nn.Identity(), torch.float32), *parts[1].experts("geglu")]
    hidden_states, row_index, local_experts, pair_weights = some_work((5, 3, 4, 2), 9, torch.float32)
    oracle = torch.zeros(9, HIDDEN_SIZE, dtype=torch.float64)
    for row, local, weight in zip(row_index.tolist(), local_experts.tolist(), pair_weights.double(), strict=True):
        own = hidden_states[row : row + 1].double()
        answers = [every_answer(parts[0], "swiglu", own)[0], own, *every_answer(parts[1], "geglu", own)]
        oracle[row] += weight * answers[local][0]
    for order in ([0, 1, 2, 3], [2, 1, 0, 3], [1, 3, 0, 2]):
        bank = ExpertBank([experts[each] for each in order], HIDDEN_SIZE, torch.float32, kernel=kernel)
        places = torch.tensor([order.index(local) for local in local_experts.tolist()])
        places, by_place = places.sort(stable=True)
        ours = run(bank, (hidden_states, row_index[by_place], places, pair_weights[by_place]))
        assert_close(ours, oracle, summed=4 * HIDDEN_SIZE + 14)


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


def test_a_module_that_changes_its_rows_does_so_to_its_own() -> None:
    """With one row, nothing is gathered: the row was the caller's, and the next expert's."""
    bank = ExpertBank(
        [ModuleExpert(torch.nn.ReLU(inplace=True), torch.float32), ModuleExpert(torch.nn.Identity(), torch.float32)], 3, torch.float32
    )
    rows = torch.tensor([[-1.0, 2.0, -3.0]])
    out = run(bank, (rows, torch.tensor([0, 0]), torch.tensor([0, 1]), torch.ones(2)))
    assert rows.tolist() == [[-1.0, 2.0, -3.0]]
    assert out.tolist() == [[-1.0, 4.0, -3.0]]


class Recorded(torch.nn.Module):
    """Doubles its rows, and knows how many there were at a time."""

    def __init__(self, seen: list[int]) -> None:
        super().__init__()
        self._seen = seen

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        self._seen.append(len(rows))
        return 2 * rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weighs_inputs", [False, True])
def test_torch_compiles_for_few_numbers_of_rows_only(weighs_inputs: bool, dtype: torch.dtype) -> None:
    seen: list[int] = []
    bank = ExpertBank([ModuleExpert(Recorded(seen), dtype)], 8, dtype, scale_inputs=weighs_inputs)
    for count in (*range(1, 200), *range(200, 4000, 9)):
        hidden_states = (torch.arange(8.0) + torch.arange(count)[:, None] % 7).to(dtype)
        out = run(bank, (hidden_states, torch.arange(count), torch.zeros(count, dtype=torch.int64), torch.full((count,), 0.5)))
        assert torch.equal(out, hidden_states.float())
        assert count <= seen[-1] <= max(count + 15, count * 9 / 8)
    assert len(set(seen)) < 70
