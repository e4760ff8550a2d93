"""How few hosts have room for the weights."""

from __future__ import annotations

import pytest

from moeserve import ConfigError, load_config
from moeserve.checkpoints import host_bytes, layer_sources
from moeserve.config import ServiceConfig
from moeserve.control import Wanted
from moeserve.placement import plan_placement
from tests.support.planning import planner_of

LAYER = {"hidden_size": 16, "intermediate_size": 8, "num_experts": 8}


def config_for(**placement: object) -> ServiceConfig:
    return load_config({"layers": [LAYER], "placement": {"num_hosts": "all", **placement}})


def test_what_the_configuration_says() -> None:
    config = config_for(cpus_per_host=2, gpus_per_host=0.5, node_labels={"pool": "x"}, node_strategy="pack", copies=2)
    assert planner_of(config).wanted("all") == Wanted("all", 2, 0.5, {"pool": "x"}, "pack", least=2, most=16)


@pytest.mark.parametrize("fewest", [1, 3, 4, 8])
def test_as_few_hosts_as_hold_the_weights(fewest: int) -> None:
    bare = config_for()
    sources = layer_sources(bare)

    def largest(num_hosts: int) -> int:
        placing = bare.placement.model_copy(update={"num_hosts": num_hosts})
        return max(host_bytes(sources, plan_placement([source.spec for source in sources], placing)))

    assert planner_of(config_for(memory_per_host_bytes=largest(fewest))).wanted("all").least == fewest
    with pytest.raises(ConfigError, match="memory_per_host_bytes allows"):
        planner_of(config_for(memory_per_host_bytes=largest(8) - 1)).wanted("all")


def test_what_no_number_of_hosts_makes_possible() -> None:
    config = config_for(pipeline_stages=2)
    with pytest.raises(ConfigError, match="pipeline_stages is 2; allowed: at most the number of layers, 1"):
        planner_of(config).wanted("all")
