"""Between the bounds every number of hosts can be planned with."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moeserve import ConfigError
from moeserve.config import PlacementConfig
from moeserve.placement import fewest_hosts, most_hosts, plan_placement
from tests.placement.layers import STRATEGIES, spec_of


@st.composite
def host_numbers(draw: st.DrawFn) -> tuple[list[int], PlacementConfig]:
    experts = draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    config = PlacementConfig(
        num_hosts="all",
        copies=draw(st.integers(1, 3)),
        tensor_parallel=draw(st.integers(1, 3)),
        pipeline_stages=draw(st.integers(1, len(experts))),
        strategy=draw(STRATEGIES),
    )
    return experts, config


@given(num_hosts=host_numbers())
@settings(deadline=None)
def test_all_numbers_between_the_bounds_can_be_planned_and_the_bounds_are_bounds(num_hosts: tuple[list[int], PlacementConfig]) -> None:
    experts, config = num_hosts
    specs = [spec_of(number) for number in experts]
    fewest, most = fewest_hosts(specs, config), most_hosts(specs, config)
    for num_hosts in range(fewest, most + 1):
        placing = config.model_copy(update={"num_hosts": num_hosts})
        assert plan_placement(specs, placing).num_hosts == num_hosts
    assume(fewest > 1)
    with pytest.raises(ConfigError):
        plan_placement(specs, config.model_copy(update={"num_hosts": fewest - 1}))


def test_experts_per_host_needs_hosts() -> None:
    specs = [spec_of(8), spec_of(4)]
    assert fewest_hosts(specs, PlacementConfig(num_hosts="all", experts_per_host=3)) == 3
    assert fewest_hosts(specs, PlacementConfig(num_hosts="all", experts_per_host=3, copies=2, pipeline_stages=2)) == 12


def test_copies_and_shards_give_more_hosts_something_to_do() -> None:
    assert most_hosts([spec_of(8)], PlacementConfig()) == 8
    assert most_hosts([spec_of(8)], PlacementConfig(tensor_parallel=2)) == 16


def test_copies_of_a_layer_that_is_not_served_are_refused() -> None:
    specs, config = [spec_of(4), spec_of(2)], PlacementConfig(num_hosts=2, copies={"default": 1, "nobody": 2})
    sentence = r"^placement\.copies names layer 'nobody', which is not served; served: 2 layers, from .* to "
    with pytest.raises(ConfigError, match=sentence):
        plan_placement(specs, config)
    with pytest.raises(ConfigError, match=sentence):
        fewest_hosts(specs, config)
