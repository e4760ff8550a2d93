"""What banks of experts are compared with: every expert on every row, added up pair by pair, in float64.

R rows, N (row, expert) pairs, H hidden size, I intermediate size, E experts.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moeserve.config import Activation, Kernel, parsed_activation
from moeserve.errors import ConfigError
from moeserve.experts import ExpertBank, Shape, is_gated
from moeserve.experts.choice import kernels_for
from moeserve.experts.feed_forward import ROWS
from tests.support.closeness import assert_close
from tests.support.stacked import Stacked

HIDDEN_SIZE, INTERMEDIATE_SIZE = 16, 24
ACTIVATIONS: tuple[Activation, ...] = (
    *("swiglu", "geglu", "geglu_tanh", "gelu", "relu", "relu2", "swigluoai"),
    *("swiglu(0.75)", "swiglu_post(0.5)", "swiglu_post", "swigluoai(1.5)"),
)
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
    """hidden_states [R, H], row_index [N], local_experts [N], weights [N]; a row may be read by any number of pairs, or by none."""
    generator = torch.Generator().manual_seed(sum(counts))
    hidden_states = torch.randn(num_rows, hidden_size, generator=generator).to(dtype)
    row_index = torch.randint(num_rows, (sum(counts),), generator=generator)
    local_experts = torch.repeat_interleave(torch.tensor(counts))
    return hidden_states, row_index, local_experts, torch.rand(sum(counts), generator=generator)


def every_answer(weights: Stacked, activation: Activation, x: Tensor) -> Tensor:
    """x [R, H] float64 -> [E, R, H] float64: every expert's answer to every row, from the definition of the activation."""
    hidden = torch.einsum("egh,rh->erg", weights.gate_up_proj.double(), x)
    if weights.gate_up_bias is not None:
        hidden = hidden + weights.gate_up_bias.double()[:, None]
    intermediate_size = weights.down_proj.shape[2]
    gate, up = hidden[..., :intermediate_size], hidden[..., intermediate_size:]
    name, limit = parsed_activation(activation)
    top = math.inf if limit is None else limit
    gaussian = gate * (1 + torch.erf(gate / math.sqrt(2))) / 2
    hidden = {
        "swiglu": lambda: gate.clamp(max=top) / (1 + torch.exp(-gate.clamp(max=top))) * up.clamp(-top, top),
        "swiglu_post": lambda: (gate / (1 + torch.exp(-gate))).clamp(max=top) * up.clamp(-top, top),
        "geglu": lambda: gaussian * up,
        "geglu_tanh": lambda: gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) / 2 * up,
        "gelu": lambda: gaussian,
        "relu": lambda: gate.clamp(min=0),
        "relu2": lambda: gate.clamp(min=0) ** 2,
        "swigluoai": lambda: gate.clamp(max=top) / (1 + torch.exp(-1.702 * gate.clamp(max=top))) * (up.clamp(-top, top) + 1),
    }[name]()
    answers = torch.einsum("ehi,eri->erh", weights.down_proj.double(), hidden)
    return answers if weights.down_bias is None else answers + weights.down_bias.double()[:, None]


def expected(weights: Stacked, activation: Activation, work: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    hidden_states, row_index, local_experts, pair_weights = work
    share = [[0.0] * len(hidden_states) for _ in range(len(weights.down_proj))]
    for row, slot, weight in zip(row_index.tolist(), local_experts.tolist(), pair_weights.tolist(), strict=True):
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


def kernels(dtype: torch.dtype, weights: torch.dtype | None = None) -> list[Kernel]:
    """All that can be asked for here."""
    found: list[Kernel] = ["torch"]
    for name in ("amx", "avx512_bf16", "avx512", "avx2", "generic"):
        with contextlib.suppress(ConfigError):
            found += kernels_for(Shape(weights or dtype, dtype, "swiglu", 32, 32, 1), name)  # type: ignore[arg-type]
    return found


def run(bank: ExpertBank, work: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    out = torch.full(work[0].shape, float("nan"))
    bank.run(*work, out=out)
    return out


CASES: list[Any] = [("cpu", dtype, kernel) for dtype in DTYPES for kernel in kernels(dtype)]
CASES += [pytest.param("cuda", dtype, "auto", marks=pytest.mark.gpu) for dtype in DTYPES if "cuda" in DEVICES]
