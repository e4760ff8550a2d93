"""`moeserve leave`: mark the node as draining in Ray, wait until the service has moved its hosts; then the node may end.

Works without Ray's help on the node itself, whose raylet ends as soon as nothing is left there.
"""

from __future__ import annotations

import time

from moeserve.cluster.ray_internals import ClusterFromOutside, canonical_address, nodes_here
from moeserve.cluster.ray_reservation import host_number
from moeserve.cluster.ray_runtime import knock
from moeserve.cluster.timing import LEAVE_LOOK_S
from moeserve.errors import ConfigError, MoEServeError
from moeserve.observe.stats import host_name


def leave(address: str, namespace: str, timeout_s: float, node: str | None = None) -> None:
    """Mark a node as draining, and wait until no detached expert host of `namespace` has a place there.

    `node`: its id; None = the one that runs on this machine, or in this container. Raises ConfigError when there is no such node,
    MoEServeError when hosts are still there after `timeout_s`.
    """
    try:
        address = canonical_address(address)
    except (ConnectionError, ValueError):
        raise ConfigError(f"--address {address} finds no Ray on this machine: give host:port of the cluster") from None
    knock(address)
    cluster = ClusterFromOutside(address)
    node = _node(cluster, node)
    deadline = time.time() + timeout_s
    accepted, why = cluster.drain(node, "moeserve leave", deadline)
    if not accepted:
        raise MoEServeError(f"Ray refuses to drain node {node}: {why}")
    while hosts := _hosts_on(cluster, node, namespace):
        if time.time() > deadline:
            raise MoEServeError(f"after {timeout_s:g} s there {_are(hosts)} still on node {node}: is there room for them elsewhere?")
        time.sleep(LEAVE_LOOK_S)


def _node(cluster: ClusterFromOutside, node: str | None) -> str:
    live = cluster.live_nodes()
    if node is not None:
        if node not in live:
            raise ConfigError(f"there is no live node {node!r} in this cluster")
        return node
    here = sorted(live & nodes_here())
    if len(here) != 1:
        raise ConfigError(
            f"{len(here)} nodes of this cluster run here: give --node, one of {', '.join(here)}"
            if here
            else "no node of this cluster runs here: give --node"
        )
    return here[0]


def _hosts_on(cluster: ClusterFromOutside, node: str, namespace: str) -> list[int]:
    """Numbers of the hosts with a place on the node."""
    there = (
        (group_id, host_number(group["name"]))
        for group_id, group in cluster.placement_groups().items()
        if group["state"] != "REMOVED" and node in group["bundles_to_node_id"].values()
    )
    return sorted(number for group_id, number in there if number is not None and cluster.group_of(host_name(number), namespace) == group_id)


def _are(hosts: list[int]) -> str:
    return ("is " if len(hosts) == 1 else "are ") + ", ".join(map(host_name, hosts))
