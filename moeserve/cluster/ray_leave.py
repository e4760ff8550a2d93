"""Leaving a node before it goes: Ray is told that it drains, the service moves what is there, and only then may it end.

Works without Ray's help on the node itself, whose raylet ends as soon as nothing is left there.
"""

from __future__ import annotations

import time

from ray._private import services
from ray._private.state import GlobalState
from ray._raylet import GcsClient, GcsClientOptions  # type: ignore[attr-defined]

from moeserve.cluster.ray_reservation import host_number
from moeserve.cluster.ray_runtime import knock
from moeserve.errors import ConfigError, MoEServeError
from moeserve.observe.stats import host_name

_PREEMPTION = 2  # of ray's DrainNodeReason: it goes, whether it is idle or not
_POLL_S = 0.5


def leave(address: str, namespace: str, timeout_s: float, node: str | None = None) -> None:
    """Mark a node as draining, and wait until no detached expert host of `namespace` has a place there.

    `node`: its id; None = the one that runs on this machine, or in this container. Raises ConfigError when there is no such node,
    MoEServeError when hosts are still there after `timeout_s`.
    """
    try:
        address = services.canonicalize_bootstrap_address_or_die(address)
    except ConnectionError:
        raise ConfigError(f"no Ray runs here that --address {address} could mean: give host:port of the cluster") from None
    knock(address)
    cluster = GlobalState()
    cluster._initialize_global_state(GcsClientOptions.create(address, None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=False))
    node = _node(cluster, node)
    deadline = time.time() + timeout_s
    accepted, why = GcsClient(address=address).drain_node(node, _PREEMPTION, "moeserve leave", int(deadline * 1000))
    if not accepted:
        raise MoEServeError(f"Ray does not let node {node} drain: {why}")
    while hosts := _hosts_on(cluster, node, namespace):
        if time.time() > deadline:
            raise MoEServeError(f"after {timeout_s:g} s there {_are(hosts)} still on node {node}: is there room for them elsewhere?")
        time.sleep(_POLL_S)


def _node(cluster: GlobalState, node: str | None) -> str:
    live: set[str] = {each["NodeID"] for each in cluster.node_table() if each["Alive"]}
    if node is not None:
        if node not in live:
            raise ConfigError(f"there is no live node {node!r} in this cluster")
        return node
    here = sorted(live & set(services.find_node_ids()))
    if len(here) != 1:
        raise ConfigError(
            f"{len(here)} nodes of this cluster run here: give --node, one of {', '.join(here)}"
            if here
            else "no node of this cluster runs here: give --node"
        )
    return here[0]


def _hosts_on(cluster: GlobalState, node: str, namespace: str) -> list[int]:
    """Numbers of the hosts with a place on the node."""
    there = (
        (group_id, host_number(group["name"]))
        for group_id, group in cluster.placement_group_table().items()
        if group["state"] != "REMOVED" and node in group["bundles_to_node_id"].values()
    )
    return sorted(number for group_id, number in there if number is not None and _is_in(cluster, namespace, number, group_id))


def _is_in(cluster: GlobalState, namespace: str, number: int, group_id: str) -> bool:
    named = cluster.get_placement_group_by_name(host_name(number), namespace)
    return named is not None and named["placement_group_id"] == group_id


def _are(hosts: list[int]) -> str:
    return ("is " if len(hosts) == 1 else "are ") + ", ".join(map(host_name, hosts))
