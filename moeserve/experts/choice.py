"""Which kernel computes the experts of one shape: measured once per process, on this processor, with the threads it has.

H hidden size, I intermediate size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from math import prod
from typing import Final

import numpy as np
import torch

from moeserve.config import Activation, Kernel
from moeserve.experts.activations import is_gated
from moeserve.experts.feed_forward import LINEAR, ROWS, FeedForward, Form
from moeserve.experts.packed import PackedExperts, kernels_for
from moeserve.kernels import Arena, aligned, fastest_of

log = logging.getLogger(__name__)

_FORMS: Final[tuple[Form, ...]] = ("linear", "transposed")
#: bytes of weights that are measured with: of one expert, so that no choice takes long; and of all, so that they come from memory
_EXPERT_BYTES, _ALL_BYTES = 2**22, 2**23
#: times that differ by less than this factor are the same
_ALIKE = 1.05


@dataclass(frozen=True)
class Shape:
    """What a choice depends on."""

    dtype: torch.dtype
    activation: Activation
    hidden_size: int
    intermediate_size: int
    num_threads: int

    @classmethod
    def of(cls, expert: FeedForward) -> Shape:
        hidden_size, intermediate_size = expert.down_proj.shape
        return cls(expert.gate_up_proj.dtype, expert.activation, hidden_size, intermediate_size, torch.get_num_threads())

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return f"{name} {self.activation}, {self.hidden_size} x {self.intermediate_size}, {self.num_threads} threads"


@dataclass(frozen=True)
class Choice:
    """kernel: the compiled one, None = torch's operators, called in the form of `forms` for each of ROWS.

    microseconds: what one expert took, by candidate and number of rows; empty where there was nothing to choose.
    """

    kernel: str | None
    forms: tuple[Form, ...]
    microseconds: Mapping[str, tuple[float, ...]]


def chosen(expert: FeedForward, kernel: Kernel = "auto", deterministic: bool = False) -> Choice:
    """For experts like this one. kernel: "auto" = the fastest, "torch" = the fastest form of torch's operators, or the one to take.
    deterministic: a compiled one where there is any, because these compute a row alike whatever else they compute.

    Raises ConfigError when this processor, or this type of weights, has not the kernel that is asked for.
    """
    return measured(Shape.of(expert), kernel, deterministic)


@cache
def measured(shape: Shape, kernel: Kernel, deterministic: bool) -> Choice:
    """As `chosen`, for a shape; kept as long as the process lives."""
    kernels = kernels_for(shape.dtype, shape.activation, kernel)
    if kernel not in ("auto", "torch"):
        return Choice(kernels[0], LINEAR, {})
    choice = _measure(shape, kernels, deterministic)
    taken = choice.kernel or f"torch ({', '.join(f'{rows}: {form}' for rows, form in zip(ROWS, choice.forms, strict=True))})"
    times = "; ".join(f"{name} {' '.join(f'{each:.0f}' for each in row)}" for name, row in choice.microseconds.items())
    log.info("kernel for experts of %s: %s (us per expert for %s rows: %s)", shape, taken, ", ".join(map(str, ROWS)), times)
    return choice


def _measure(shape: Shape, kernels: tuple[str, ...], deterministic: bool) -> Choice:
    """The kernel that is fastest for all numbers of rows together, so that there is one for all of them; else the fastest forms."""
    experts = _some_experts(shape)
    runs: dict[str, Callable[[torch.Tensor], object]] = {form: _one_by_one(experts, form) for form in _FORMS}
    runs |= _packed(experts, kernels)
    seconds = [_seconds(runs, torch.ones(rows, shape.hidden_size, dtype=shape.dtype)) for rows in ROWS]
    forms = tuple(min(_FORMS, key=taken.__getitem__) for taken in seconds)
    of_torch = prod(taken[form] for form, taken in zip(forms, seconds, strict=True))
    of_kernels = {name: prod(taken[name] for taken in seconds) for name in kernels}
    # Of those that differ by less than measuring does, the widest.
    enough = min(of_kernels.values(), default=0.0) * _ALIKE ** len(ROWS)
    fastest = next((name for name in kernels if of_kernels[name] <= enough), None)
    if fastest is not None and not deterministic and of_torch < of_kernels[fastest]:
        fastest = None
    return Choice(fastest, forms, {name: tuple(taken[name] / len(experts) * 1e6 for taken in seconds) for name in runs})


def _seconds(runs: Mapping[str, Callable[[torch.Tensor], object]], rows: torch.Tensor) -> dict[str, float]:
    return fastest_of({name: partial(run, rows) for name, run in runs.items()})


def _some_experts(shape: Shape) -> list[FeedForward]:
    """In memory that goes back to the system afterwards."""
    parts, hidden = 2 if is_gated(shape.activation) else 1, shape.hidden_size
    channel_bytes = (parts + 1) * hidden * shape.dtype.itemsize
    inner = max(1, min(shape.intermediate_size, _EXPERT_BYTES // channel_bytes // 32 * 32))
    count = max(1, min(64, _ALL_BYTES // (inner * channel_bytes)))
    sizes = parts * inner * hidden, inner * hidden
    arena = Arena(count * sum(aligned(size * shape.dtype.itemsize) for size in sizes))

    def weights(size: int, *matrix: int) -> torch.Tensor:
        taken = arena.take(size, shape.dtype)
        assert taken is not None, "there is room for all of them"
        return taken.fill_(0.01).view(matrix)

    return [FeedForward(shape.activation, weights(sizes[0], parts * inner, hidden), weights(sizes[1], hidden, inner)) for _ in range(count)]


def _one_by_one(experts: list[FeedForward], form: Form) -> Callable[[torch.Tensor], object]:
    formed = [replace(expert, forms=(form,) * len(ROWS)) for expert in experts]

    def run(rows: torch.Tensor) -> None:
        index, total = torch.arange(len(rows)), torch.zeros(rows.shape)
        for expert in formed:
            total.index_add_(0, index, expert(rows.index_select(0, index)).mul_(0.5))

    return run


def _packed(experts: list[FeedForward], kernels: tuple[str, ...]) -> dict[str, Callable[[torch.Tensor], object]]:
    packed = PackedExperts("generic", room_for=len(experts))
    for expert in experts if kernels else ():
        packed.add(expert)
    return {name: partial(_run, packed.computed_by(name)) for name in kernels}


def _run(packed: PackedExperts, rows: torch.Tensor) -> None:
    row_index = torch.arange(len(rows)).repeat(packed.num_experts)
    counts = np.full(packed.num_experts, len(rows))
    packed.run(rows, row_index, counts, None, torch.full((len(row_index),), 0.5), torch.empty(rows.shape))
