"""Which kernel computes the experts of one shape: measured once per process, on this processor, with the threads it has.

H hidden size, I intermediate size.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from math import prod
from typing import Final

import numpy as np
import torch

from moeserve.api.tensors import dtype_name
from moeserve.config import Activation, Bits, Kernel
from moeserve.errors import ConfigError, number_of
from moeserve.experts.activations import is_gated
from moeserve.experts.expert import Expert
from moeserve.experts.feed_forward import LINEAR, ROWS, FeedForward, Form
from moeserve.experts.packable import Packable, packable
from moeserve.experts.packed import PackedExperts
from moeserve.experts.packed_expert import PackedExpert, pack
from moeserve.experts.pairs import Pairs
from moeserve.experts.quantized import QuantizedFeedForward, quantize
from moeserve.kernels import KERNELS, TYPES, TimeLimit, WeightArena, WeightArenas, aligned, fastest_of, find_kernel

log = logging.getLogger(__name__)

_BITS: Final[Mapping[torch.dtype, Bits]] = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}
#: kernels that round rows to bfloat16
_IN_BFLOAT16: Final = ("amx", "avx512_bf16")
_FORMS: Final[tuple[Form, ...]] = ("linear", "transposed")
#: bytes of weights that are measured with: of one expert, so that no choice takes long; and of all, so that they come from memory
_EXPERT_BYTES, _ALL_BYTES = 2**22, 2**23
#: hosts that are threads of one process load side by side: each would measure, disturbed by the others, and choose for itself
_MEASURING: Final = threading.Lock()
#: times that differ by less than this factor are the same
_ALIKE = 1.05
#: On a machine that is busy, threads that compute together wait for each other. Then fewer numbers of rows are measured.
_LONGEST_S = 3.0


@dataclass(frozen=True)
class Shape:
    """What a choice depends on."""

    dtype: torch.dtype
    rows_dtype: torch.dtype
    activation: Activation
    hidden_size: int
    intermediate_size: int
    num_threads: int

    @classmethod
    def of(cls, expert: Packable) -> Shape:
        """That of an expert, with the threads that this process has now."""
        rows_dtype, (hidden_size, intermediate_size) = expert.rows_dtype, expert.down_proj.shape
        return cls(expert.down_proj.dtype, rows_dtype, expert.activation, hidden_size, intermediate_size, torch.get_num_threads())

    @property
    def is_plain(self) -> bool:
        """Whether weights are in the type of rows, not in few bits."""
        return self.dtype == self.rows_dtype

    @property
    def kind(self) -> str:
        """For people: "int8 by bfloat16 swiglu"."""
        rows = "" if self.is_plain else f" by {dtype_name(self.rows_dtype)}"
        return f"{dtype_name(self.dtype)}{rows} {self.activation}"

    def __str__(self) -> str:
        return f"{self.kind}, {self.hidden_size} x {self.intermediate_size}, {number_of(self.num_threads, 'thread')}"


@dataclass(frozen=True)
class Choice:
    """kernel: the compiled one, None = torch's operators, called in the form of `forms` for each of ROWS.

    microseconds: what one expert took, by candidate and number of rows, as many of ROWS as there was time for; empty where there was
    nothing to choose.
    """

    kernel: str | None
    forms: tuple[Form, ...]
    microseconds: Mapping[str, tuple[float, ...]]


def chosen(expert: Packable, kernel: Kernel = "auto", deterministic: bool = False) -> Choice:
    """What computes experts like this one.

    kernel: "auto" = the fastest, "torch" = the fastest form of torch's operators, or the one to take. deterministic: a compiled one
    where there is any, because these compute a row alike whatever else they compute.

    Raises ConfigError when this processor, or this type of weights, has not the kernel that is asked for.
    """
    with _MEASURING:
        return measured(Shape.of(expert), kernel, deterministic)


@cache
def measured(shape: Shape, kernel: Kernel, deterministic: bool) -> Choice:
    """As `chosen`, for a shape; kept as long as the process lives."""
    kernels = kernels_for(shape, kernel)
    if kernel not in ("auto", "torch"):
        return Choice(kernels[0], LINEAR, {})
    choice = _measure(shape, kernels, deterministic)
    taken = choice.kernel or f"torch ({', '.join(f'{rows}: {form}' for rows, form in zip(ROWS, choice.forms, strict=True))})"
    times = "; ".join(f"{name} {' '.join(f'{each:.0f}' for each in row)}" for name, row in choice.microseconds.items())
    rows = ROWS[: min(map(len, choice.microseconds.values()))]
    log.info("kernel for experts of %s: %s (us per expert for %s rows: %s)", shape, taken, ", ".join(map(str, rows)), times)
    if len(rows) < len(ROWS):
        log.warning("this machine is busy: kernels were tried for %g s, with up to %s", _LONGEST_S, number_of(rows[-1], "row"))
    return choice


def _measure(shape: Shape, kernels: tuple[str, ...], deterministic: bool) -> Choice:
    """The kernel that is fastest for all numbers of rows together, so that there is one for all of them; else the fastest forms."""
    experts = _some_experts(shape)
    of_torch: dict[str, Callable[[torch.Tensor], object]] = _one_by_one(experts)
    runs = {**of_torch, **_packed(experts, kernels)}
    seconds = list(_seconds(runs, shape))
    best = tuple(min(of_torch, key=taken.__getitem__) for taken in seconds)
    torch_total = prod(taken[form] for form, taken in zip(best, seconds, strict=True))
    totals = {name: prod(taken[name] for taken in seconds) for name in kernels}
    # Of those that differ by less than measuring does, the widest.
    enough = min(totals.values(), default=0.0) * _ALIKE ** len(seconds)
    fastest = next((name for name in kernels if totals[name] <= enough), None)
    if fastest is not None and not deterministic and torch_total < totals[fastest]:
        fastest = None
    best += best[-1:] * (len(ROWS) - len(best))
    forms: tuple[Form, ...] = best if shape.is_plain else LINEAR  # type: ignore[assignment]
    return Choice(fastest, forms, {name: tuple(taken[name] / len(experts) * 1e6 for taken in seconds) for name in runs})


def _seconds(runs: Mapping[str, Callable[[torch.Tensor], object]], shape: Shape) -> Iterator[dict[str, float]]:
    """Of each candidate, for as many of ROWS as there is time for."""
    limit = TimeLimit(_LONGEST_S)
    for number in ROWS:
        if number > ROWS[0] and limit.is_over:
            return
        rows = torch.ones(number, shape.hidden_size, dtype=shape.rows_dtype)
        yield fastest_of({name: partial(run, rows) for name, run in runs.items()}, limit=limit)


def _some_experts(shape: Shape) -> list[FeedForward | QuantizedFeedForward]:
    """In memory that goes back to the system afterwards."""
    parts, hidden, dtype = 2 if is_gated(shape.activation) else 1, shape.hidden_size, shape.rows_dtype
    channel_bytes = (parts + 1) * hidden * dtype.itemsize
    inner = max(1, min(shape.intermediate_size, _EXPERT_BYTES // channel_bytes // 32 * 32))
    count = max(1, min(64, _ALL_BYTES // (inner * channel_bytes)))
    sizes = parts * inner * hidden, inner * hidden
    arena = WeightArena(count * sum(aligned(size * dtype.itemsize) for size in sizes))

    def weights(size: int, *matrix: int) -> torch.Tensor:
        taken = arena.take(size, dtype)
        assert taken is not None, "there is room for all of them"
        return taken.fill_(0.01).view(matrix)

    experts = [
        FeedForward(shape.activation, weights(sizes[0], parts * inner, hidden), weights(sizes[1], hidden, inner)) for _ in range(count)
    ]
    return list(experts) if shape.is_plain else [quantize(expert, _BITS[shape.dtype]) for expert in experts]


def _one_by_one(experts: Sequence[FeedForward | QuantizedFeedForward]) -> dict[str, Callable[[torch.Tensor], object]]:
    plain = [expert for expert in experts if isinstance(expert, FeedForward)]
    if not plain:
        return {"tiles": partial(_run_one_by_one, experts)}
    return {form: partial(_run_one_by_one, [replace(expert, forms=(form,) * len(ROWS)) for expert in plain]) for form in _FORMS}


def _run_one_by_one(experts: Sequence[Expert], rows: torch.Tensor) -> None:
    index, total = torch.arange(len(rows)), torch.zeros(rows.shape, dtype=torch.float32)
    for expert in experts:
        total.index_add_(0, index, expert(rows.index_select(0, index)).mul_(0.5))


def _packed(experts: Sequence[Expert], kernels: tuple[str, ...]) -> dict[str, Callable[[torch.Tensor], object]]:
    arenas, packed = WeightArenas(len(experts)), list[PackedExpert]()
    for expert in experts if kernels else ():
        whole = packable(expert)
        assert whole is not None, "made for this"
        packed.append(pack(whole, "generic", expert.nbytes, arenas))
    banks = {name: PackedExperts([replace(each, kind=each.kind._replace(kernel=name)) for each in packed]) for name in kernels}
    return {name: partial(_run_packed, bank) for name, bank in banks.items()}


def _run_packed(packed: PackedExperts, rows: torch.Tensor) -> None:
    row_index = torch.arange(len(rows)).repeat(len(packed.held))
    counts = np.full(len(packed.held), len(rows))
    weights, out = torch.full((len(row_index),), 0.5, dtype=torch.float32), torch.empty(rows.shape, dtype=torch.float32)
    packed.run(rows, Pairs(row_index, counts, None, weights), out, False)


def kernels_for(shape: Shape, kernel: Kernel) -> tuple[str, ...]:
    """Those to choose from. Raises ConfigError when one that is asked for cannot run."""
    if kernel == "torch":
        return ()
    there = tuple(name for name in KERNELS if _can(name, shape))
    if kernel != "auto":
        if kernel not in there:
            allowed = ", ".join(("auto", "torch", *there))
            raise ConfigError(f"model.kernel is {kernel!r}, which cannot compute {shape.kind} experts here; allowed: {allowed}")
        return (kernel,)
    # What runs everywhere is only worth trying where nothing better does.
    return tuple(name for name in there if name != "generic") or there


def _can(kernel: str, shape: Shape) -> bool:
    is_rounded = kernel in _IN_BFLOAT16 and shape.rows_dtype != torch.bfloat16
    return not is_rounded and shape.dtype in TYPES and find_kernel(kernel, TYPES[shape.dtype]) is not None
