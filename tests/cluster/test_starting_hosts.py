"""A host's process that starts while the releases in force change, and reservations for hosts that never start."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from pathlib import Path

import pytest
import ray

from moeserve import load_config
from moeserve.cluster.folders import SocketFolder
from moeserve.cluster.ray_expert_host import ExpertHost, HostOrder
from moeserve.cluster.ray_reservation import find_reservations, reserve_all
from moeserve.cluster.ray_where import this_node
from moeserve.config import PlacementConfig, ServedModel
from moeserve.control import Assignment
from moeserve.placement import LayerPlacement, Placement
from moeserve.release import Release
from tests.support.hanging_files import hanging
from tests.support.planning import planner_of
from tests.support.seeded_folders import folder
from tests.support.waiting import until_async

pytestmark = pytest.mark.ray


def test_a_host_that_starts_while_others_forget_has_what_they_have(tmp_path: Path, local_ray: None) -> None:
    served = folder(tmp_path / "served", 0)
    config = load_config({"model": {"checkpoint": served, "dtype": "float32"}, "placement": {"num_hosts": 2}})
    planner = planner_of(config)
    first = Release.first(planner.plan(2), planner.layers.sources)
    layers = tuple(LayerPlacement.of(2, layer.unit_of_physical, 1 - layer.host_of_physical) for layer in first.placement.layers)
    second, third = replace(first, placement=Placement(2, 2, layers)), replace(first, placement=replace(first.placement, epoch=3))
    order = HostOrder(0, config.only(ServedModel), SocketFolder(f"starting-{os.getpid()}"), over_tcp=False)
    host = ExpertHost.options(num_cpus=0).remote(order)  # type: ignore[attr-defined]
    with hanging(served / "model.safetensors") as until_wanted:
        starting = [host.start.remote([first, second, third], ())]
        until_wanted()
        starting.append(host.start.remote([second], ()))
        for _ in range(20):  # Ray does not promise that calls begin in their order
            ray.get(host.experts_read.remote())
    _, info = ray.get(starting)
    assert info.experts_held == len(second.placement.layers[0].shards_on(0)) == 2, "and nothing of the other releases"
    ray.get(host.stop.remote())
    ray.kill(host)


async def test_reservations_of_a_change_that_is_given_up_are_given_back(monkeypatch: pytest.MonkeyPatch, local_ray: None) -> None:
    monkeypatch.setattr("moeserve.cluster.ray_reservation.GRANT_TIMEOUT_S", 3600.0)
    room = PlacementConfig(cpus_per_host=1000.0)
    asking = asyncio.create_task(reserve_all([Assignment(number, this_node()) for number in (901, 902)], room, detached=True))
    await until_async(lambda: find_reservations().keys() >= {901, 902})
    asking.cancel()
    await asyncio.wait({asking})
    assert asking.cancelled()
    await until_async(lambda: find_reservations().keys().isdisjoint({901, 902}))
