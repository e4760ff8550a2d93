"""How few and how many hosts can share a model's experts, against trying every number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeserve import ConfigError, load_config
from moeserve.checkpoints import host_bytes
from moeserve.control import Planner
from tests.support.planning import planner_of

LAYER = {"hidden_size": 8, "intermediate_size": 4, "num_experts": 6}


def limits(layers: list[dict[str, Any]], placement: Mapping[str, Any]) -> tuple[int, int]:
    config = load_config({"layers": layers, "placement": placement})
    return both(planner_of(config))


def both(planner: Planner) -> tuple[int, int]:
    wanted = planner.wanted("all")
    assert wanted.most is not None
    return wanted.least, wanted.most


@settings(max_examples=40, deadline=None)
@given(
    experts=st.lists(st.integers(2, 7), min_size=1, max_size=3),
    copies=st.integers(1, 3),
    tensor_parallel=st.integers(1, 2),
    stages=st.integers(1, 2),
    strategy=st.sampled_from(["contiguous", "round_robin"]),
)
def test_limits_are_those_of_trying_every_number(experts: list[int], copies: int, tensor_parallel: int, stages: int, strategy: str) -> None:
    if stages > len(experts):
        return
    placement = {"copies": copies, "tensor_parallel": tensor_parallel, "pipeline_stages": stages, "strategy": strategy}
    config = load_config({"layers": [{**LAYER, "num_experts": number} for number in experts], "placement": placement})
    planner = planner_of(config)
    possible = [number for number in range(1, 100) if is_possible(number, planner)]
    if possible:
        gap = next(number for number in range(possible[0], 101) if number not in possible)
        assert both(planner) == (possible[0], gap - 1)
    else:
        with pytest.raises(ConfigError):
            both(planner)


def is_possible(number: int, planner: Planner) -> bool:
    try:
        planner.plan(number)
    except ConfigError:
        return False
    return True


def test_memory_and_experts_per_host_ask_for_more_hosts() -> None:
    planner = planner_of(load_config({"layers": [LAYER]}))
    whole = host_bytes(planner.layers.sources, planner.plan(1))[0]
    assert limits([LAYER], {}) == (1, 6)
    assert limits([LAYER], {"memory_per_host_bytes": whole}) == (1, 6)
    assert limits([LAYER], {"memory_per_host_bytes": whole - 1}) == (2, 6)
    assert limits([LAYER], {"experts_per_host": 2}) == (3, 6)
    with pytest.raises(ConfigError, match=r"would hold \d+ bytes of weights, but placement\.memory_per_host_bytes allows 1 bytes"):
        limits([LAYER], {"memory_per_host_bytes": 1})
