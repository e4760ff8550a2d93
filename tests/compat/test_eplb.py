"""EPLB's function: its arguments and results, never less balanced than the published algorithm.

L layers, E logical experts, R replicas, G GPUs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeserve import ConfigError
from moeserve.compat.eplb import rebalance_experts
from tests.support.eplb_oracle import Floats, balancedness, published


@st.composite
def problems(draw: st.DrawFn) -> tuple[Floats, int, int, int, int]:
    """Weights, then R, groups, nodes and G, which divide as EPLB wants."""
    nodes, gpus_per_node = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    groups = nodes * draw(st.integers(1, 3)) if draw(st.booleans()) else 1
    experts = groups * draw(st.integers(1, 8))
    num_gpus = nodes * gpus_per_node
    replicas = num_gpus * (-(-experts // num_gpus) + draw(st.integers(0, 3)))
    drawn = np.random.default_rng(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(["lognormal", "zipf", "few", "one", "equal", "sorted"]))
    weight = {
        "lognormal": lambda: drawn.lognormal(0, 1.5, (3, experts)),
        "zipf": lambda: np.stack([drawn.permutation(np.arange(1, experts + 1) ** -1.2) for _ in range(3)]),
        "few": lambda: drawn.integers(0, 4, (3, experts)).astype(float),
        "one": lambda: np.eye(3, experts) * 100 + (drawn.random((3, experts)) < 0.5),
        "equal": lambda: np.ones((3, experts)),
        "sorted": lambda: np.tile(np.arange(experts, 0, -1.0), (3, 1)),
    }[kind]()
    return weight, replicas, groups, nodes, num_gpus


@given(problem=problems())
@settings(deadline=None, max_examples=150)
def test_never_less_balanced_than_the_published_algorithm(problem: tuple[Floats, int, int, int, int]) -> None:
    weight, replicas, groups, nodes, num_gpus = problem
    physical, logical, count = rebalance_experts(torch.from_numpy(weight), replicas, groups, nodes, num_gpus)
    assert balancedness(weight, physical.numpy(), num_gpus) >= balancedness(weight, published(*problem), num_gpus) - 1e-9
    assert physical.shape == (3, replicas)
    assert (count >= 1).all()
    assert logical.shape == (*weight.shape, int(count.max()))
    for layer in range(3):
        for expert in range(weight.shape[1]):
            places = logical[layer, expert]
            assert (physical[layer] == expert).nonzero()[:, 0].tolist() == places[: count[layer, expert]].tolist()
            assert (places[count[layer, expert] :] == -1).all()
        if groups % nodes == 0:
            node_of = np.repeat(np.arange(nodes), replicas // nodes)
            group_of = physical[layer].numpy() // (weight.shape[1] // groups)
            assert all(len(set(node_of[group_of == group])) == 1 for group in range(groups))


def test_the_example_of_its_readme() -> None:
    weight = torch.tensor([[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]])
    physical, logical, count = rebalance_experts(weight, 16, 4, 2, 8)
    theirs = np.array([[5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1], [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1]])
    assert balancedness(weight.double().numpy(), physical.numpy(), 8) >= balancedness(weight.double().numpy(), theirs, 8)
    assert [each.dtype for each in (physical, logical, count)] == [torch.int64] * 3
    assert (physical.shape, logical.shape, count.sum(dim=1).tolist()) == ((2, 16), (2, 12, 2), [16, 16])
    assert np.array_equal(rebalance_experts(weight.numpy(), 16, 4, 2, 8)[0], physical)


def test_numbers_need_not_divide() -> None:
    weight = np.random.default_rng(0).lognormal(0, 1, (2, 60))
    physical, _, count = rebalance_experts(weight, 71, 7, 3, 7)
    assert count.sum(dim=1).tolist() == [71, 71]
    assert balancedness(weight, physical.numpy(), 7) > 0.98
    # Copies that would share a GPU are of no use; there are as many as places for them.
    physical, _, count = rebalance_experts(np.array([[5.0, 1.0]]), 9, 1, 1, 2)
    assert count.sum().item() == 9


@pytest.mark.parametrize(
    ("weight", "replicas", "gpus", "message"),
    [
        ([[1.0, 2.0]], 1, 1, r"num_replicas is 1; allowed: at least the number of logical experts, 2"),
        ([[1.0, 2.0]], 2, 0, r"num_gpus is 0; allowed: at least 1"),
        ([[1.0, 2.0]], 2, 3, r"num_gpus is 3; allowed: at most the number of replicas, 2"),
        ([[1.0, float("nan")]], 2, 1, r"weight has negative numbers, NaN or Inf"),
        ([[1.0, 2.0]], 2.5, 1, r"num_replicas is 2\.5; allowed: whole numbers"),
        ([[1.0, 2.0]], 2, "1", r"num_gpus is '1'; allowed: whole numbers"),
        ([[1.0, 2.0], [3.0]], 2, 1, r"weight has rows of different lengths"),
        ([1.0, 2.0], 2, 1, r"weight has shape \[2\] and type float64; allowed: numbers, \[layers, logical experts\]"),
    ],
)
def test_what_cannot_be_is_refused(weight: list[list[float]], replicas: Any, gpus: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rebalance_experts(weight, replicas, 1, 1, gpus)


@pytest.mark.parametrize("name", ["num_replicas", "num_groups", "num_nodes", "num_gpus"])
@pytest.mark.parametrize("number", [0, -1])
def test_there_is_at_least_one_of_each(name: str, number: int) -> None:
    numbers = {"num_replicas": 4, "num_groups": 1, "num_nodes": 1, "num_gpus": 2, name: number}
    with pytest.raises(ConfigError, match=f"{name} is {number}; allowed: at least 1"):
        rebalance_experts(torch.ones(1, 2), **numbers)


@pytest.mark.parametrize("weight", [torch.ones(1, 2, dtype=torch.complex64), torch.ones(1, 2).to_sparse(), torch.ones(1, 2, device="meta")])
def test_tensors_that_are_no_loads_are_refused(weight: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match=r"weight is a tensor of .*; allowed: real numbers, dense"):
        rebalance_experts(weight, 2, 1, 1, 1)
