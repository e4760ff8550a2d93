"""A Ray cluster of three nodes on this machine, and a fleet that outlives its drivers. Run by test_three_nodes.py in a process of its own.

The head has no label; `wide` has two logical GPUs, `narrow` has one. With an argument it is the second driver, which adopts the fleet.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from ray.cluster_utils import Cluster

import moeserve.cli.verbs  # noqa: F401 - not while hosts leave: without them their node ends, and `leave` would not find it
from moeserve import MoELayer, MoEServeError
from moeserve.api.request import LayerRequest
from moeserve.checkpoints import layer_sources
from moeserve.cli.app import main as cli
from moeserve.cluster.ray_fleet import RayFleet
from moeserve.cluster.ray_internals import allow_clusters
from moeserve.cluster.ray_leave import leave
from moeserve.cluster.ray_nodes import RayNodes
from moeserve.cluster.ray_reservation import find_hosts, find_reservations
from moeserve.cluster.ray_runtime import RayRuntime
from moeserve.config import ServedModel, ServiceConfig, load_config
from moeserve.control import Assignment, reconcile
from moeserve.control.first_state import first_state
from moeserve.frontend import Frontend, FrontendSettings, HostAccess
from moeserve.observe.metrics import Metrics
from moeserve.observe.stats import HostInfo
from moeserve.placement import plan_placement
from moeserve.release import Release
from moeserve.transport import KeyPair
from tests.support.closeness import assert_close
from tests.support.planning import planner_of, renumbered
from tests.support.waiting import until_async

allow_clusters(False)  # every port on 127.0.0.1
LAYER = {"hidden_size": 16, "intermediate_size": 8, "num_experts": 8}
SERVICE, STRANGER = f"three-nodes-{os.getpid()}", 7
FOLDER = Path(tempfile.gettempdir(), f"moeserve-{SERVICE}")
# A node that dies closes its connections; one that is only slow to answer must not be taken for dead.
QUICK = {"health_check_period_ms": 500, "health_check_failure_threshold": 3}


def config_for(address: str, **placement: Any) -> ServiceConfig:
    placing = {"num_hosts": 3, "cpus_per_host": 0.25, "gpus_per_host": 0.5, "node_labels": {"pool": "experts"}, **placement}
    return load_config({"layers": [LAYER], "placement": placing, "ray": {"address": address}})


def fleet_for(config: ServiceConfig) -> RayFleet:
    return RayFleet(config.only(ServedModel), config.placement, config.ray, detached=True)


def release_on(assignments: list[Assignment], config: ServiceConfig, epoch: int) -> Release:
    placing = config.placement.model_copy(update={"num_hosts": len(assignments)})
    specs = [source.spec for source in layer_sources(config)]
    return Release(renumbered(plan_placement(specs, placing), [assignment.number for assignment in assignments], epoch))


async def first_driver(cluster: Cluster, wide: Any, narrow: Any) -> None:
    config = config_for(cluster.address)
    fleet, planner = fleet_for(config), planner_of(config)
    nodes, wanted = RayNodes(fleet), planner.wanted(config.placement.num_hosts)
    await only_what_fits(nodes, config)

    assignments = list((await first_state(planner, nodes)).assignments)
    names = {wide.node_id: "wide", narrow.node_id: "narrow"}
    print("assignments", [names[assignment.node] for assignment in assignments])
    fleet.start(SERVICE)
    ready: list[HostInfo] = []
    release = release_on(assignments, config, 1)
    await fleet.take(release, [*assignments, Assignment(STRANGER, wide.node_id)], ready.append)
    infos = {info.name: info for info in ready}
    for assignment in assignments:
        info = infos[f"host-{assignment.number}"]
        assert info.node == assignment.node
        assert [endpoint.partition(":")[0] for endpoint in info.endpoints] == ["unix", "tcp"]
    gpus = sorted((names[info.node], info.cuda_visible_devices) for info in ready)
    print("GPUs", gpus)
    assert FOLDER.stat().st_mode & 0o777 == 0o700 and len(list(FOLDER.glob("host-*.sock"))) == 4  # noqa: ASYNC240
    listed = {node.id: node for node in await nodes.list()}
    assert {key: listed[key].free["GPU"] for key in names} == {wide.node_id: 2, narrow.node_id: 1}, (
        "own hosts are counted by their assignments"
    )
    assert reconcile(list(listed.values()), assignments, wanted, 8).assignments == tuple(assignments)

    pids = {info.name: info.pid for info in ready}
    told = json.dumps(
        {
            "service": SERVICE,
            "address": cluster.address,
            "assignments": [(assignment.number, assignment.node) for assignment in assignments],
            "pids": pids,
        }
    )
    second = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-m", "tests.cluster.three_nodes", told], text=True, check=False, stdout=subprocess.PIPE
    )
    print(second.stdout.strip())
    assert second.returncode == 0

    changes: list[dict[int, HostInfo]] = []
    watching = asyncio.create_task(fleet.watch(lambda hosts: changes.append(dict(hosts))))
    await until_async(lambda: fleet.given_up == {STRANGER})
    cluster.remove_node(narrow, allow_graceful=False)
    lost = next(assignment.number for assignment in assignments if assignment.node == narrow.node_id)
    await until_async(lambda: fleet.given_up == {STRANGER, lost} and lost not in changes[-1])
    watching.cancel()
    print("given up with its node", lost)

    after = reconcile(await nodes.list(), assignments, wanted, 8, fleet.given_up)
    assert after.shortage is None
    await fleet.take(release_on(list(after.assignments), config, 2), after.assignments)
    await fleet.retire(2)
    await fleet.remove([STRANGER, lost])
    print(
        "then",
        [(assignment.number, names[assignment.node]) for assignment in after.assignments],
        sorted(fleet.given_up),
        sorted(find_hosts()),
    )
    await a_node_is_left(cluster, fleet, nodes, wide.node_id)


async def only_what_fits(nodes: RayNodes, config: ServiceConfig) -> None:
    """What cannot be had is said; what is there is used."""
    for placement in ({"num_hosts": 7}, {"node_strategy": "strict_spread"}, {"node_labels": {"pool": "none"}}):
        try:
            await first_state(planner_of(config_for(config.ray.address or "", **placement)), nodes)
        except MoEServeError as error:
            print("refused:", error)
    everywhere = (await first_state(planner_of(config_for("", num_hosts="all")), nodes)).assignments
    packed = (await first_state(planner_of(config_for("", num_hosts=4, node_strategy="pack")), nodes)).assignments
    print("all", len(everywhere), "packed on", len({assignment.node for assignment in packed}))


async def a_node_is_left(cluster: Cluster, fleet: RayFleet, nodes: RayNodes, node: str) -> None:
    try:
        await asyncio.to_thread(leave, cluster.address, "moeserve", 1.0, node)
    except MoEServeError as error:
        print("leaving:", str(error).replace(node, "wide"))
    assert {each.id for each in await nodes.list() if each.is_leaving} == {node}
    leaving = asyncio.create_task(asyncio.to_thread(cli, ["leave", "--address", cluster.address, "--node", node, "--timeout-s", "60"]))
    await asyncio.sleep(0)
    await fleet.stop()
    print("left:", await leaving, find_hosts(), find_reservations())


async def second_driver(address: str, service: str, assignments: list[Assignment], pids: dict[str, int]) -> None:
    config = config_for(address)
    assert STRANGER in find_hosts()
    fleet, keys, release = fleet_for(config), KeyPair.generate(), release_on(assignments, config, 1)
    fleet.start(service)
    await fleet.adopt(release, assignments)
    for assignment in assignments:
        assert (await fleet.find(assignment.number)).pid == pids[f"host-{assignment.number}"], "the same process as before"
    await until_async(lambda: find_hosts() == {assignment.number for assignment in assignments} == set(find_reservations()))
    await fleet.admit({keys.public})
    sources, hidden_states = layer_sources(config), torch.randn(20, 16)
    metrics = Metrics([source.spec for source in sources], "off")
    hosts, settings = HostAccess(fleet.find, keys, lambda layer, healthy: None), FrontendSettings.of(config, config.server)
    frontend = Frontend(release, sources, settings, hosts, metrics)
    await frontend.start("no node of this cluster")
    expected = MoELayer(**LAYER)(hidden_states)
    assert_close((await frontend.forward(0, LayerRequest(hidden_states))).hidden_states, expected)
    once_more = fleet_for(config)
    once_more.start(service)
    await once_more.adopt(release, assignments)
    assert {(await once_more.find(assignment.number)).pid for assignment in assignments} <= set(pids.values())
    assert_close((await frontend.forward(0, LayerRequest(hidden_states))).hidden_states, expected)
    assert not any(link.restarts for link in frontend._links.values()), "who adopts hosts does not cut off frontends it does not know yet"
    await frontend.close()
    print("adopted", sorted(fleet.given_up), "and answered over TCP")


def main() -> None:
    if len(sys.argv) > 1:
        told = json.loads(sys.argv[1])
        runtime = RayRuntime(config_for(told["address"]).ray, config_for("").placement)
        runtime.start()
        asyncio.run(
            second_driver(told["address"], told["service"], [Assignment(*assignment) for assignment in told["assignments"]], told["pids"])
        )
        runtime.stop()
        return
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False, "_system_config": QUICK})
    wide = cluster.add_node(num_cpus=2, num_gpus=2, labels={"pool": "experts"})
    narrow = cluster.add_node(num_cpus=2, num_gpus=1, labels={"pool": "experts"})
    runtime = RayRuntime(config_for(cluster.address).ray, config_for("").placement)
    try:
        runtime.start()
        asyncio.run(first_driver(cluster, wide, narrow))
    finally:
        runtime.stop()
        cluster.shutdown()
        shutil.rmtree(FOLDER, ignore_errors=True)  # the node that died has left its socket, which here is everybody's folder
    sys.stdout.flush()


if __name__ == "__main__":
    main()
