"""The grouped pass against every expert on every row, added up pair by pair, in float64.

R rows, N (row, expert) pairs, H hidden size, I intermediate size, E experts.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moeserve.config import Activation, Kernel
from moeserve.errors import ConfigError, InvalidRequest
from moeserve.experts import ExpertBank, FeedForward, is_gated
from moeserve.experts.feed_forward import ROWS
from moeserve.experts.packed import kernels_for
from moeserve.experts.ragged import Stack
from moeserve.kernels import library
from tests.closeness import assert_close
from tests.stacked import Stacked

HIDDEN_SIZE, INTERMEDIATE_SIZE = 16, 24
ACTIVATIONS: tuple[Activation, ...] = ("swiglu", "geglu", "gelu", "relu", "swigluoai")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)

#: pairs per expert: one pair; idle experts; more than the last number a form is chosen for; every expert busy; many
COUNTS = [
    (1,),
    (0, 0, 1, 0),
    (ROWS[-1], ROWS[-1] + 1, 0, 1),
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
        "swigluoai": lambda: gate.clamp(max=7) / (1 + torch.exp(-1.702 * gate.clamp(max=7))) * (up.clamp(-7, 7) + 1),
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


def bank_of(
    weights: Stacked, activation: Activation, dtype: torch.dtype, device: str = "cpu", kernel: Kernel = "auto", deterministic: bool = False
) -> ExpertBank:
    experts, where = weights.experts(activation), torch.device(device)
    return ExpertBank(experts, weights.down_proj.shape[1], dtype, device=where, kernel=kernel, deterministic=deterministic)


def kernels(dtype: torch.dtype) -> list[Kernel]:
    """All that can be asked for here."""
    found: list[Kernel] = ["torch"]
    for name in ("amx", "avx512_bf16", "avx512", "avx2", "generic"):
        with contextlib.suppress(ConfigError):
            found += kernels_for(dtype, "swiglu", name)  # type: ignore[arg-type]
    return found


def test_the_compiled_kernels_are_there() -> None:
    """Without them every other test here would pass, on torch's operators."""
    assert library() is not None
    assert "generic" in kernels(torch.float32)


def run(bank: ExpertBank, work: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    out = torch.full(work[0].shape, float("nan"))
    bank.run(*work, out=out)
    return out


CASES = [("cpu", dtype, kernel) for dtype in DTYPES for kernel in kernels(dtype)]
CASES += [("cuda", dtype, "auto") for dtype in DTYPES if "cuda" in DEVICES]


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
    hidden_states, row_index, slots, pair_weights = work = some_work((3, 2, 40, 1), 20, dtype)
    oracle = torch.zeros(20, HIDDEN_SIZE, dtype=torch.float64)
    for slot, part in enumerate(parts):
        if part is not None:
            own = slots == slot
            oracle += expected(part, "swiglu", (hidden_states, row_index[own], torch.zeros_like(slots[own]), pair_weights[own]))
    out = run(ExpertBank(experts, HIDDEN_SIZE, dtype, device=torch.device(device), kernel=kernel), work)
    assert_close(out, oracle, summed=2 * HIDDEN_SIZE + 130 + 46, rounded_to=dtype)


@pytest.mark.parametrize(("device", "dtype", "kernel"), CASES, ids=str)
def test_weights_of_what_goes_in_and_a_shared_expert(device: str, dtype: torch.dtype, kernel: Kernel) -> None:
    weights, shared = some_weights(2, "swiglu", False, dtype), some_weights(1, "swiglu", False, dtype, HIDDEN_SIZE, 40)
    hidden_states, row_index, slots, pair_weights = work = some_work((5, 3, 9), 9, dtype)
    sides = {"shared": shared.experts("swiglu")[0], "device": torch.device(device), "scale_inputs": True, "kernel": kernel}
    bank = ExpertBank(weights.experts("swiglu"), HIDDEN_SIZE, dtype, **sides)
    rounded = pair_weights.to(dtype)
    oracle = torch.zeros(9, HIDDEN_SIZE, dtype=torch.float64)
    for row, slot, rounded_weight, weight in zip(row_index.tolist(), slots.tolist(), rounded, pair_weights, strict=True):
        own, x = hidden_states[row : row + 1], weight.double()
        if slot < 2:
            own, x = own * rounded_weight, torch.ones((), dtype=torch.float64)
        answers = every_answer(weights if slot < 2 else shared, "swiglu", own.double())
        oracle[row] += x * answers[slot if slot < 2 else 0, 0]
    assert_close(run(bank, work), oracle, summed=4 * HIDDEN_SIZE + 17, rounded_to=dtype)


@pytest.mark.parametrize(("device", "dtype", "kernel"), CASES, ids=str)
def test_experts_come_out_as_they_went_in_and_others_take_their_slots(device: str, dtype: torch.dtype, kernel: Kernel) -> None:
    old, new = some_weights(3, "geglu", True, dtype), some_weights(5, "geglu", True, dtype)
    bank = bank_of(old, "geglu", dtype, device, kernel)
    changed = bank.replaced({1: new.experts("geglu")[4]})
    for slot, (before, after) in enumerate(zip(bank.experts, changed.experts, strict=True)):
        assert isinstance(before, FeedForward)
        assert isinstance(after, FeedForward)
        for name in before.tensors:
            assert torch.equal(before.tensors[name].cpu(), getattr(old, name)[slot])
            assert torch.equal(after.tensors[name].cpu(), getattr(new, name)[4] if slot == 1 else getattr(old, name)[slot])
    work = some_work((3, 2, 4), 5, dtype)
    mixed = Stacked(*(torch.stack([mine[0], other[4], mine[2]]) for mine, other in zip(old, new, strict=True)))
    assert_agrees(run(changed, work), expected(mixed, "geglu", work), 9, dtype)
    assert_agrees(run(bank, work), expected(old, "geglu", work), 9, dtype)


@pytest.mark.parametrize(("dtype", "kernel"), [(dtype, kernel) for dtype in DTYPES for kernel in kernels(dtype)], ids=str)
@given(data=st.data())
@settings(deadline=None, max_examples=10)
def test_deterministic_answers_do_not_depend_on_company_or_threads(data: st.DataObject, dtype: torch.dtype, kernel: Kernel) -> None:
    weights = some_weights(4, "swiglu", True, dtype, 64, 96)
    bank = bank_of(weights, "swiglu", dtype, kernel=kernel, deterministic=True)
    counts = tuple(data.draw(st.lists(st.integers(0, 40), min_size=4, max_size=4).filter(any)))
    hidden_states, row_index, slots, pair_weights = some_work(counts, data.draw(st.integers(1, 50)), dtype, 64)
    together = torch.full(hidden_states.shape, float("nan"))
    bank.run(hidden_states, row_index, slots, pair_weights, out=together)
    torch.set_num_threads(1)
    try:
        for row in set(row_index.tolist()):
            own, alone = row_index == row, torch.full((1, 64), float("nan"))
            bank.run(hidden_states[row : row + 1], row_index[own] * 0, slots[own], pair_weights[own], out=alone)
            assert torch.equal(alone[0], together[row])
    finally:
        torch.set_num_threads(2)


@pytest.mark.parametrize("kernel", kernels(torch.float16))
def test_answers_beyond_float16_are_weighed_before_they_are_rounded(kernel: Kernel) -> None:
    weights = some_weights(2, "swiglu", False, torch.float16)
    large = Stacked((weights.gate_up_proj * 300).clamp(-6e4, 6e4), (weights.down_proj * 3000).clamp(-6e4, 6e4))
    hidden_states, row_index, slots, pair_weights = some_work((4, 4), 8, torch.float16)
    work = hidden_states, row_index, slots, pair_weights * 1e-6
    oracle = expected(large, "swiglu", work)
    assert (oracle / pair_weights.min() * 1e6).abs().max() > torch.finfo(torch.float16).max
    assert_close(run(bank_of(large, "swiglu", torch.float16, kernel=kernel), work), oracle, summed=72, rounded_to=torch.float16)


def test_a_bank_with_one_expert_replaced_shares_the_rest() -> None:
    size = 2**11
    bank = bank_of(some_weights(8, "swiglu", False, torch.bfloat16, size, size), "swiglu", torch.bfloat16)
    (other,) = some_weights(1, "swiglu", False, torch.bfloat16, size, size).experts("swiglu")
    before = resident_bytes()
    changed = bank.replaced({3: other})
    assert resident_bytes() - before < 2 * other.nbytes < bank.nbytes == changed.nbytes


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@pytest.mark.parametrize("row", [-1, 3, 2**40])
def test_a_row_that_is_not_there_is_refused(row: int) -> None:
    bank = bank_of(some_weights(2, "swiglu", False, torch.float32), "swiglu", torch.float32)
    with pytest.raises(InvalidRequest, match=r"a pair names a row that is not there; allowed: 0\.\.2"):
        run(bank, (torch.randn(3, HIDDEN_SIZE), torch.tensor([0, row]), torch.tensor([0, 1]), torch.ones(2)))


def test_a_kernel_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model.kernel is 'amx', which cannot compute float32 .* experts here; allowed: auto, torch, "):
        bank_of(some_weights(1, "swiglu", False, torch.float32), "swiglu", torch.float32, kernel="amx")


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_stack_of_experts_agrees_with_the_oracle(activation: Activation, bias: bool, dtype: torch.dtype, counts: tuple[int, ...]) -> None:
    weights = some_weights(len(counts), activation, bias, dtype)
    hidden_states, row_index, _, pair_weights = work = some_work(counts, num_rows=70, dtype=dtype)
    out = torch.empty(hidden_states.shape)
    Stack(weights.experts(activation), torch.device("cpu")).run(hidden_states, row_index, np.array(counts), None, pair_weights, out)
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
