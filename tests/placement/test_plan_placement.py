"""Where experts go: each to exactly one host, evenly, and known to the byte beforehand.

E experts, D hosts.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeserve import ConfigError, load_config
from moeserve.checkpoints import bank_bytes, check_memory, host_bytes, layer_sources, load_bank, memory_bytes
from moeserve.config import PlacementConfig
from moeserve.placement import LayerPlacement, plan_placement
from tests.placement.layers import STRATEGIES, spec_of


def experts_on(layer: LayerPlacement, host: int) -> list[int]:
    return [shard.expert for shard in layer.shards_on(host)]


@st.composite
def plans(draw: st.DrawFn) -> tuple[list[int], PlacementConfig]:
    experts = draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    return experts, PlacementConfig(num_hosts=draw(st.integers(1, max(experts))), strategy=draw(STRATEGIES))


@given(plan=plans())
@settings(deadline=None)
def test_every_expert_lives_on_exactly_one_host_and_hosts_are_even(plan: tuple[list[int], PlacementConfig]) -> None:
    experts, config = plan
    placement = plan_placement([spec_of(number) for number in experts], config)
    assert (placement.epoch, placement.num_hosts) == (1, config.num_hosts)
    for num_experts, layer in zip(experts, placement.layers, strict=True):
        held = [experts_on(layer, host) for host in range(config.num_hosts)]
        assert sorted(expert for host in held for expert in host) == list(range(num_experts))
        sizes = [len(host) for host in held]
        assert max(sizes) - min(sizes) <= 1
    assert all(any(experts_on(layer, host) for layer in placement.layers) for host in range(config.num_hosts))


@given(plan=plans())
@settings(deadline=None)
def test_numbers_lead_back_and_forth(plan: tuple[list[int], PlacementConfig]) -> None:
    experts, config = plan
    for num_experts, layer in zip(experts, plan_placement([spec_of(number) for number in experts], config).layers, strict=True):
        assert layer.host_of_physical.tolist() == sorted(layer.host_of_physical.tolist())
        assert layer.logical_of_physical[layer.first_physical].tolist() == list(range(num_experts))
        for expert in range(num_experts):
            physical = layer.first_physical[expert]
            host, slot = int(layer.host_of_physical[physical]), int(layer.local_expert_of_physical[physical])
            assert experts_on(layer, host)[slot] == expert


def test_strategies_keep_neighbours_together_or_deal_them_out() -> None:
    def held(strategy: str) -> list[list[int]]:
        layer = plan_placement([spec_of(7)], PlacementConfig(num_hosts=3, strategy=strategy)).layers[0]
        return [experts_on(layer, host) for host in range(3)]

    assert held("contiguous") == [[0, 1, 2], [3, 4], [5, 6]]
    assert held("round_robin") == [[0, 3, 6], [1, 4], [2, 5]]


@pytest.mark.parametrize("strategy", ["contiguous", "round_robin"])
def test_odd_experts_of_several_layers_go_to_several_hosts(strategy: str) -> None:
    placement = plan_placement([spec_of(4)] * 3, PlacementConfig(num_hosts=3, strategy=strategy))
    assert [sum(len(experts_on(layer, host)) for layer in placement.layers) for host in range(3)] == [4, 4, 4]


def test_more_experts_than_sixteen_bits_can_number() -> None:
    (layer,) = plan_placement([spec_of(70_000)], PlacementConfig(num_hosts=2)).layers
    assert layer.first_physical.tolist() == list(range(70_000))


def test_more_hosts_than_experts_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"placement\.num_hosts is 9, but no layer has enough experts for that many: 1 of them would have none"
    ):
        plan_placement([spec_of(8), spec_of(2)], PlacementConfig(num_hosts=9))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("activation", ["swiglu", "geglu", "gelu", "relu"])
def test_a_host_holds_as_many_bytes_as_was_said(activation: str, bias: bool, dtype: str) -> None:
    layers = [
        {"hidden_size": 5, "intermediate_size": 3, "num_experts": number, "activation": activation, "bias": bias} for number in (7, 2)
    ]
    sources = layer_sources(load_config({"model": {"dtype": dtype}, "layers": layers}))
    specs = [source.spec for source in sources]
    placement = plan_placement(specs, PlacementConfig(num_hosts=3))
    for host in range(3):
        for source, layer in zip(sources, placement.layers, strict=True):
            shards = layer.shards_on(host)
            assert bank_bytes(source, shards) == load_bank(source, shards).nbytes


def test_a_checkpoint_too(tiny_moe: Path) -> None:
    sources = layer_sources(load_config(tiny_moe))
    specs = [source.spec for source in sources]
    placement = plan_placement(specs, PlacementConfig(num_hosts=3, strategy="round_robin"))
    for source, layer in zip(sources, placement.layers, strict=True):
        assert bank_bytes(source, layer.shards_on(2)) == load_bank(source, layer.shards_on(2)).nbytes > 0


def test_what_does_not_fit_is_refused_before_anything_starts() -> None:
    layer = {"hidden_size": 1024, "intermediate_size": 1024, "num_experts": 4}
    limit = 3 * 2**22 * 2 - 1

    def checked(machine_bytes: int, **tables: dict[str, object]) -> list[int]:
        config = load_config({"layers": [layer], **tables})
        sources = layer_sources(config)
        nbytes = host_bytes(sources, plan_placement([source.spec for source in sources], config.placement))
        check_memory(nbytes, config.placement, machine_bytes if config.ray.address is None else None)
        return nbytes

    assert checked(2**30, placement={"num_hosts": 2}) == [limit + 1] * 2
    with pytest.raises(ConfigError, match=r"host-0 would hold 0\.02 GiB of weights, but placement\.memory_per_host_bytes allows 0\.02 GiB"):
        checked(2**30, placement={"num_hosts": 2, "memory_per_host_bytes": limit})
    checked(2**30, placement={"num_hosts": 4, "memory_per_host_bytes": limit})
    with pytest.raises(ConfigError, match=r"2 hosts would hold 0\.05 GiB of weights, but this machine has 0\.04 GiB"):
        checked(40 * 2**20, placement={"num_hosts": 2})
    checked(40 * 2**20, placement={"num_hosts": 2}, model={"quantization": "int8"})
    checked(40 * 2**20, placement={"num_hosts": 2}, ray={"address": "10.0.0.1:6379"})
    checked(40 * 2**20, placement={"num_hosts": 2, "gpus_per_host": 1})
    assert memory_bytes() > 2**28


@given(experts=st.lists(st.integers(1, 6), min_size=1, max_size=8), shards=st.integers(1, 4), strategy=STRATEGIES, data=st.data())
@settings(deadline=None)
def test_copies_that_only_some_experts_have_stand_apart(experts: list[int], shards: int, strategy: str, data: st.DataObject) -> None:
    """No host has more shards of an expert than there are copies of it: what it holds of one copy is one shard."""
    num_hosts = data.draw(st.integers(max(shards, *experts), 9))
    copies = {"a": {str(expert): number for expert, number in enumerate(experts)}}
    config = PlacementConfig(num_hosts=num_hosts, copies=copies, tensor_parallel=shards, strategy=strategy)
    try:
        (layer,) = plan_placement([replace(spec_of(len(experts)), name="a")], config).layers
    except ConfigError as error:
        assert "num_hosts" in str(error)
        return
    held = list(zip(layer.unit_of_physical.tolist(), layer.host_of_physical.tolist(), strict=True))
    assert len({*held}) == len(held)
    assert Counter(unit for unit, _ in held) == {unit: experts[unit // shards] for unit in range(len(experts) * shards)}
    on_hosts = Counter((unit // shards, host) for unit, host in held)
    assert all(number <= experts[expert] for (expert, _), number in on_hosts.items())
