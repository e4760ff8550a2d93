"""How few hosts have room for the weights."""

from __future__ import annotations

import pytest

from moeserve import ConfigError, load_config
from moeserve.checkpoints import host_bytes, layer_sources
from moeserve.config import MAX_HOSTS, ServiceConfig
from moeserve.control import Assignment, State, Wanted
from moeserve.control.changes import moved, with_copies
from moeserve.control.copies import changed_copies
from moeserve.control.record import read_release, release_message
from moeserve.placement import plan_placement
from moeserve.release import Release
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


@pytest.mark.parametrize(("num_hosts", "stages", "most"), [(1, 1, 1), (2, 1, 2), (4, 2, 2)])
def test_a_service_begins_with_as_many_copies_as_balancing_says(num_hosts: int, stages: int, most: int) -> None:
    placement = {"num_hosts": num_hosts, "pipeline_stages": stages}

    def planned(**tables: object) -> int:
        return int(planner_of(load_config({"layers": [LAYER, LAYER], "placement": placement, **tables})).first_num_hosts())

    assert planned(balancing={"min_copies": most}) == num_hosts
    with pytest.raises(ConfigError, match=rf"balancing.min_copies is {most + 1} with {num_hosts} hosts?; allowed: at most {most},"):
        planned(balancing={"min_copies": most + 1})
    assert planned(balancing={"min_copies": most + 1}, autoscaling={"enabled": True}) == num_hosts, "more hosts may come"


def test_deterministic_experts_have_one_copy_however_that_is_said() -> None:
    config = {"model": {"deterministic": True}, "layers": [LAYER, LAYER]}
    tables = {"default": 1, "layers.0": {"default": 1, "3": 1}}
    planner = planner_of(load_config({**config, "placement": {"num_hosts": 2, "copies": tables}}))
    state = State(
        Release.first(planner.plan(2), planner.layers.sources), (Assignment(0, ""), Assignment(1, "")), 2, last_epoch=1, next_number=2
    )
    for layer, expert in (("", None), ("layers.1", None), ("layers.0", 5)):
        after = with_copies(state, changed_copies(planner, layer, expert, 1), planner)
        assert after.release is state.release, "nothing is to be moved"
        with pytest.raises(ConfigError, match=r"^model.deterministic is true; allowed: 1 copy"):
            with_copies(state, changed_copies(planner, layer, expert, 2), planner)
    with pytest.raises(ConfigError, match=r"model.deterministic is true, but placement.copies is"):
        load_config({**config, "placement": {"num_hosts": 2, "copies": {"default": 1, "layers.0": {"3": 2}}}})


def test_hosts_that_frontends_could_not_be_told_of_do_not_start() -> None:
    planner = planner_of(config_for(num_hosts=2))
    here = Assignment(0, ""), Assignment(1, "")
    state = State(Release.first(planner.plan(2), planner.layers.sources), here, 2, last_epoch=1, next_number=MAX_HOSTS - 1)
    after = moved(state, (*here, Assignment(MAX_HOSTS - 1, "")), 3, planner)
    assert read_release(release_message(after.release)).placement.hosts == (0, 1, MAX_HOSTS - 1)
    with pytest.raises(ConfigError, match=f"^there is no number for a further host: a service has {MAX_HOSTS}"):
        moved(after, (*after.assignments, Assignment(MAX_HOSTS, "")), 4, planner)
    assert len(moved(after, here, 2, planner).assignments) == 2, "hosts may leave"
