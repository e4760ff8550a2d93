"""Compiled code says bit by bit what the operators of torch and NumPy say, which take its place where it is missing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeserve.api.tensors import is_finite
from moeserve.config import GatingConfig
from moeserve.errors import InvalidRequest
from moeserve.gating import Routing, route
from moeserve.kernels import library
from moeserve.layer.dispatch import SharedWork, combine, plan
from moeserve.placement import LayerPlacement
from tests.experts.oracle import bank_of, some_weights, some_work

Result = TypeVar("Result")
SEEDS = st.integers(0, 2**32)


def interpreted(function: Callable[[], Result]) -> Result:
    """What it says on a machine without a compiler."""
    with pytest.MonkeyPatch.context() as machine:
        for name in ("dispatch", "route", "rows"):
            machine.setattr(f"moeserve.kernels.{name}.library", lambda: None)
        return function()


def test_it_is_compiled() -> None:
    assert library() is not None


@settings(deadline=None)
@given(
    seed=SEEDS,
    tokens=st.sampled_from([0, 1, 2, 64]),
    experts=st.sampled_from([1, 2, 8, 9, 31, 256]),
    top_k=st.integers(1, 9),
    scoring=st.sampled_from(["softmax", "sigmoid"]),
    levels=st.sampled_from([3, 1000]),
    more=st.fixed_dictionaries(
        {
            "renormalize": st.sampled_from(["none", "pre_drop", "post_drop"]),
            "routed_scaling_factor": st.sampled_from([1.0, 2.3]),
            "aux_loss": st.sampled_from(["none", "switch", "deepspeed"]),
            "aux_loss_weight": st.sampled_from([1.0, 0.1]),
            "capacity_factor": st.sampled_from([None, 1.0]),
        }
    ),
)
def test_the_same_routing(seed: int, tokens: int, experts: int, top_k: int, scoring: str, levels: int, more: dict[str, Any]) -> None:
    """With few levels, many scores are equal. Losses, which are telemetry, are added up in another order."""
    logits = torch.randint(0, levels, (tokens, experts), generator=torch.Generator().manual_seed(seed)) / levels
    gating = GatingConfig.model_validate({"top_k": min(top_k, experts), "scoring_func": scoring, **more})
    assert_same_routing(route(logits, gating), interpreted(lambda: route(logits, gating)))


def assert_same_routing(compiled: Routing, other: Routing) -> None:
    for name in (*(field.name for field in fields(compiled)), "slots", "drop_reasons"):
        ours, theirs = getattr(compiled, name), getattr(other, name)
        if name in {"aux_loss", "z_loss"}:
            assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-6), name
        elif name != "batch":
            assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs, name


#: drawn from a normal distribution, some of which has a softmax that is 0 for most experts, or for none
LOGITS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "far apart": lambda drawn: drawn * 200,
    "huge": lambda drawn: drawn * 1e30,
    "largest": lambda drawn: drawn.sign() * torch.finfo(torch.float32).max,
    "tiny": lambda drawn: drawn * 1e-42,
    "zeros of both signs": lambda drawn: torch.where(drawn > 0, 0.0, -0.0),
}


@pytest.mark.parametrize("kind", LOGITS)
@settings(deadline=None, max_examples=30)
@given(
    seed=SEEDS,
    tokens=st.sampled_from([1, 2, 9]),
    experts=st.sampled_from([1, 8, 31, 256]),
    share=st.floats(0.01, 1.0),
    more=st.fixed_dictionaries(
        {
            "routed_scaling_factor": st.sampled_from([1.0, -2.5, 0.0, 1e-30]),
            "drop_policy": st.sampled_from(["position", "choice_major"]),
            "renormalize": st.just("pre_drop"),
            "renormalize_eps": st.sampled_from([None, 0.0, 1e-9, 1.0]),
        },
        optional={"capacity_factor": st.just(0.5), "expert_group_size": st.just(2)},
    ),
)
def test_the_same_routing_of_odd_logits(kind: str, seed: int, tokens: int, experts: int, share: float, more: dict[str, Any]) -> None:
    scope = "group" if "expert_group_size" in more else "request"
    fixed = {"top_k": max(1, int(share * experts)), "capacity_scope": scope, "drop_tokens": False}
    gating = GatingConfig.model_validate(fixed | more)
    logits = LOGITS[kind](torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed)))
    assert_same_routing(route(logits, gating), interpreted(lambda: route(logits, gating)))


@settings(deadline=None)
@given(seed=SEEDS, tokens=st.sampled_from([0, 1, 3, 64]), hosts=st.integers(1, 6), copies=st.integers(1, 2), has_shared=st.booleans())
def test_the_same_messages(seed: int, tokens: int, hosts: int, copies: int, has_shared: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(tokens, 9, generator=generator).argsort(dim=1)[:, :4]
    weights, kept = torch.rand(tokens, 4, generator=generator), torch.rand(tokens, 4, generator=generator) < 0.8
    units = np.tile(np.arange(8), copies)
    placement = LayerPlacement.of(hosts, units, torch.randint(0, hosts, (len(units),), generator=generator).numpy())
    shared = SharedWork(torch.rand(tokens, generator=generator), torch.rand(tokens, generator=generator) < 0.8) if has_shared else None

    def planned() -> list[tuple[object, ...]]:
        works = plan(ids, weights, kept, placement, None, shared).works
        return [(work.host, *(part.tolist() for part in (work.rows, work.row_index, work.local_experts, work.weights))) for work in works]

    assert planned() == interpreted(planned)


@settings(deadline=None)
@given(seed=SEEDS, tokens=st.sampled_from([1, 2, 50]), width=st.sampled_from([1, 7, 64]), hosts=st.integers(1, 4))
def test_the_same_sums(seed: int, tokens: int, width: int, hosts: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = [(torch.rand(tokens, generator=generator) < 0.7).nonzero().squeeze(1) for _ in range(hosts)]
    answers = [(own, torch.randn(len(own), width, generator=generator)) for own in rows]
    assert torch.equal(combine(answers, tokens, width), interpreted(lambda: combine(answers, tokens, width)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_number_that_is_not_finite_is_found(dtype: torch.dtype, bad: float) -> None:
    numbers = torch.full((3, 37), torch.finfo(dtype).max, dtype=dtype)
    assert is_finite(numbers) and is_finite(-numbers) and is_finite(numbers[:0])
    for place in (0, 17, 110):
        spoiled = numbers.clone()
        spoiled.view(-1)[place] = bad
        assert not is_finite(spoiled) and not is_finite(spoiled.t())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_message_is_computed_as_any_work(dtype: torch.dtype) -> None:
    counts = (3, 0, 70, 1)
    weights = some_weights(len(counts), "swiglu", True, dtype)
    rows, row_index, local_experts, shares = some_work(counts, num_rows=70, dtype=dtype)
    bank = bank_of(weights, "swiglu", dtype, "cpu", "generic")
    out, of_message = torch.empty(rows.shape), torch.empty(rows.shape)
    bank.run(rows, row_index.long(), local_experts.long(), shares, out=out)
    bank.run(rows, row_index.int(), local_experts.int(), shares, out=of_message)
    assert torch.equal(out, of_message)
    for bad_rows, bad_experts in ((row_index + 70, local_experts), (row_index, local_experts + 4), (row_index, local_experts.flip(0))):
        with pytest.raises(InvalidRequest, match="that is not there"):
            bank.run(rows, bad_rows.int(), bad_experts.int(), shares, out=out)


def test_a_gradient_goes_through_torch() -> None:
    logits = torch.randn(1, 8, requires_grad=True)
    routing = route(logits, GatingConfig(top_k=2))
    (gradient,) = torch.autograd.grad(routing.topk_weights[0, 0], logits)
    assert gradient.count_nonzero() > 0
