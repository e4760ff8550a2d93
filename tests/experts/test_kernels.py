"""What the compiled kernels promise beyond right answers."""

from __future__ import annotations

import errno
import mmap
import os
import resource
import subprocess
import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeserve.config import Activation, Bits, Kernel
from moeserve.errors import ConfigError, InvalidRequest
from moeserve.experts import ExpertBank, FeedForward, QuantizedFeedForward, quantize
from moeserve.kernels import WeightArena, library, native
from tests.experts.oracle import (
    CASES,
    DTYPES,
    HIDDEN_SIZE,
    assert_agrees,
    bank_of,
    expected,
    kernels,
    run,
    some_weights,
    some_work,
)
from tests.support.closeness import assert_close
from tests.support.stacked import Stacked


def test_the_compiled_kernels_are_there() -> None:
    """Without them every other test here would pass, on torch's operators."""
    assert library() is not None
    assert "generic" in kernels(torch.float32)


def test_they_are_there_beside_mapped_files_of_any_name(tmp_path: Path) -> None:
    for name in (b"Donn\xe9es", b"a\x0cb"):
        file = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
        file.write_bytes(b"mapped")
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ):
            assert native.library.__wrapped__() is not None


def test_kernels_of_another_version_are_not_used(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """As of an editable install whose code is newer: they would take what they are given for something else, and say nothing."""
    monkeypatch.setattr(native, "INTERFACE_VERSION", native.INTERFACE_VERSION + 1)
    assert library.__wrapped__() is None
    assert "are of another version of moeserve: install it again" in caplog.text
    caplog.clear()
    monkeypatch.setattr(native, "find_spec", lambda _: ModuleSpec("_native", None, origin="libc.so.6"))
    assert library.__wrapped__() is None, "those that know of no version"
    assert "libc.so.6 are of another version of moeserve" in caplog.text


@pytest.mark.parametrize(("device", "dtype", "kernel"), CASES, ids=str)
def test_experts_come_out_as_they_went_in_and_others_take_their_places(device: str, dtype: torch.dtype, kernel: Kernel) -> None:
    old, new = some_weights(3, "geglu", True, dtype), some_weights(5, "geglu", True, dtype)
    bank = bank_of(old, "geglu", dtype, device, kernel)
    other = bank_of(new, "geglu", dtype, device, kernel)
    changed = ExpertBank([bank.held[0], other.held[4], bank.held[2]], HIDDEN_SIZE, dtype, device=torch.device(device))
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
    hidden_states, row_index, local_experts, pair_weights = some_work(counts, data.draw(st.integers(1, 50)), dtype, 64)
    together = torch.full(hidden_states.shape, float("nan"))
    bank.run(hidden_states, row_index, local_experts, pair_weights, out=together)
    torch.set_num_threads(1)
    try:
        for row in set(row_index.tolist()):
            own, alone = row_index == row, torch.full((1, 64), float("nan"))
            bank.run(hidden_states[row : row + 1], row_index[own] * 0, local_experts[own], pair_weights[own], out=alone)
            assert torch.equal(alone[0], together[row])
    finally:
        torch.set_num_threads(2)


@pytest.mark.parametrize(
    ("stored", "dtype", "kernel"),
    [
        (stored, dtype, kernel)
        for stored, dtype in (*((dtype, dtype) for dtype in DTYPES), *product((torch.int8, torch.float8_e4m3fn), DTYPES[::2]))
        for kernel in kernels(dtype, stored)
        if kernel != "torch"
    ],
    ids=str,
)
@pytest.mark.parametrize(("hidden_size", "intermediate_size"), [(200, 330), (33, 1)])
def test_a_row_is_answered_alike_however_many_there_are(
    stored: torch.dtype, dtype: torch.dtype, kernel: Kernel, hidden_size: int, intermediate_size: int
) -> None:
    """One and two rows take a panel at once, from two tiles on it may be decoded first, and a block ends at 256."""
    (expert,) = some_weights(1, "swiglu", True, dtype, hidden_size, intermediate_size).experts("swiglu")
    held = expert if stored == dtype else quantize(expert, "int8" if stored == torch.int8 else "fp8")
    bank = ExpertBank([held], hidden_size, dtype, kernel=kernel)
    rows = torch.randn(257, hidden_size, generator=torch.Generator().manual_seed(1)).to(dtype)

    def answers(some: torch.Tensor) -> torch.Tensor:
        return run(bank, (some, torch.arange(len(some)), torch.zeros(len(some), dtype=torch.int64), torch.full((len(some),), 0.7)))

    alone = torch.cat([answers(row) for row in rows.split(1)])
    for count in (2, 3, 12, 13, 14, 23, 24, 25, 26, 64, 240, 241, 256, 257):
        assert torch.equal(answers(rows[:count]), alone[:count]), count


@pytest.mark.parametrize("kernel", kernels(torch.float16))
def test_answers_beyond_float16_are_weighed_before_they_are_rounded(kernel: Kernel) -> None:
    weights = some_weights(2, "swiglu", False, torch.float16)
    large = Stacked((weights.gate_up_proj * 300).clamp(-6e4, 6e4), (weights.down_proj * 3000).clamp(-6e4, 6e4))
    hidden_states, row_index, local_experts, pair_weights = some_work((4, 4), 8, torch.float16)
    work = hidden_states, row_index, local_experts, pair_weights * 1e-6
    oracle = expected(large, "swiglu", work)
    assert (oracle / pair_weights.min() * 1e6).abs().max() > torch.finfo(torch.float16).max
    assert_close(run(bank_of(large, "swiglu", torch.float16, kernel=kernel), work), oracle, summed=72, rounded_to=torch.float16)


@pytest.mark.parametrize("activation", ["swiglu", "swiglu_post", "swigluoai(7)", "geglu_tanh"])
@pytest.mark.parametrize(
    ("dtype", "kernel"), [(dtype, kernel) for dtype in (torch.float32, torch.bfloat16) for kernel in kernels(dtype)], ids=str
)
def test_a_gate_that_is_closed_lets_nothing_through_however_large(activation: Activation, dtype: torch.dtype, kernel: Kernel) -> None:
    size = 32
    expert = FeedForward(activation, torch.cat([torch.eye(size), torch.zeros(size, size)]).to(dtype), torch.eye(size, dtype=dtype))
    expert = replace(expert, gate_up_bias=torch.cat([torch.zeros(size), torch.ones(size)]).to(dtype))
    rows = torch.tensor([-1e2, -1e10, -1e30, -3e38])[:, None] * torch.eye(1, size)
    out = run(
        ExpertBank([expert], size, dtype, kernel=kernel),
        (rows.to(dtype), torch.arange(4), torch.zeros(4, dtype=torch.int64), torch.ones(4)),
    )
    assert out.abs().max() < 1e-37


def test_banks_share_experts_and_one_that_none_has_is_freed() -> None:
    """In a process of its own: what other tests have left to the allocator is nobody's."""
    code = "from tests.experts import test_kernels; test_kernels.share_and_free()"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)


def share_and_free() -> None:
    size = 2**11
    bank = bank_of(some_weights(8, "swiglu", False, torch.bfloat16, size, size), "swiglu", torch.bfloat16)
    before = resident_bytes()
    other = bank_of(some_weights(1, "swiglu", False, torch.bfloat16, size, size), "swiglu", torch.bfloat16)
    changed = ExpertBank([*bank.held[:3], *other.held, *bank.held[4:]], size, torch.bfloat16)
    assert resident_bytes() - before < 2 * other.nbytes < bank.nbytes == changed.nbytes
    del bank
    assert resident_bytes() - before < other.nbytes / 2, "the expert that no bank has any more is not in memory"


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_a_pass_without_memory_is_no_fault_of_its_caller() -> None:
    """In a process of its own: that has no memory left afterwards."""
    code = "from tests.experts import test_kernels; test_kernels.run_out_of_memory()"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)


def run_out_of_memory() -> None:
    size, count = 512, 4096
    bank = bank_of(some_weights(1, "relu", False, torch.float32, size, size), "relu", torch.float32, kernel="generic")
    pairs = torch.arange(count, dtype=torch.int32), torch.zeros(count, dtype=torch.int32), torch.ones(count)
    rows, out = torch.randn(count, size), torch.empty(count, size)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
    resource.setrlimit(resource.RLIMIT_AS, (in_use + 2**20, resource.RLIM_INFINITY))
    with pytest.raises(MemoryError, match="there is no memory for a pass"):
        bank.run(rows, *pairs, out)


def test_a_system_without_huge_pages_has_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mapping(mmap.mmap):
        def madvise(self, option: int, *area: int) -> None:
            if option == mmap.MADV_HUGEPAGE:
                raise OSError(errno.EINVAL, "Invalid argument")  # as Linux says that was built without them
            super().madvise(option, *area)

    monkeypatch.setattr(mmap, "mmap", Mapping)
    taken = WeightArena(100).take(25, torch.float32)
    assert taken is not None
    assert not taken.any()


@pytest.mark.parametrize("row", [-1, 3, 2**40])
def test_a_row_that_is_not_there_is_refused(row: int) -> None:
    bank = bank_of(some_weights(2, "swiglu", False, torch.float32), "swiglu", torch.float32)
    with pytest.raises(InvalidRequest, match=r"a pair names a row that is not there; allowed: 0\.\.2"):
        run(bank, (torch.randn(3, HIDDEN_SIZE), torch.tensor([0, row]), torch.tensor([0, 1]), torch.ones(2)))


def test_a_kernel_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model.kernel is 'amx', which cannot compute float32 .* experts here; allowed: auto, torch, "):
        bank_of(some_weights(1, "swiglu", False, torch.float32), "swiglu", torch.float32, kernel="amx")


QUANTIZED: list[tuple[Bits, torch.dtype, Kernel]] = [
    (bits, dtype, kernel)
    for bits, stored in (("int8", torch.int8), ("fp8", torch.float8_e4m3fn))
    for dtype in (torch.float32, torch.bfloat16)
    for kernel in kernels(dtype, stored)
]  # type: ignore[assignment]


@pytest.mark.parametrize(("bits", "dtype", "kernel"), QUANTIZED, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(("hidden_size", "intermediate_size"), [(16, 24), (96, 700), (33, 64)])
def test_experts_with_a_byte_to_a_weight(
    bits: Bits, dtype: torch.dtype, kernel: Kernel, bias: bool, hidden_size: int, intermediate_size: int
) -> None:
    weights = some_weights(4, "swiglu", bias, dtype, hidden_size, intermediate_size)
    quantized = [quantize(expert, bits) for expert in weights.experts("swiglu")]
    work = some_work((3, 0, 70, 1), 20, dtype, hidden_size)
    bank = ExpertBank(quantized, hidden_size, dtype, kernel=kernel)
    gate_up = torch.stack([torch.cat([matrix.dequantized() for matrix in expert.gate_up_proj]) for expert in quantized])
    down = torch.stack([expert.down_proj.dequantized() for expert in quantized])
    exact = Stacked(gate_up, down, weights.gate_up_bias, weights.down_bias)
    summed = 2 * hidden_size + intermediate_size + 74
    assert_close(run(bank, work), expected(exact, "swiglu", work), summed=summed, rounded_to=dtype)
    for held, expert in zip(bank.experts, quantized, strict=True):
        assert isinstance(held, QuantizedFeedForward)
        assert torch.equal(held.down_proj.dequantized(), expert.down_proj.dequantized())
        assert torch.equal(torch.cat([matrix.dequantized() for matrix in held.gate_up_proj]), expert.gate_up_proj[0].dequantized())
