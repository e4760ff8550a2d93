"""The nodes of the cluster as the service sees them: their room, and whether they are draining."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

import ray
from ray.autoscaler.sdk import request_resources

from moeserve.cluster.ray_fleet import RayFleet
from moeserve.cluster.ray_internals import available_resources, draining_nodes, total_resources
from moeserve.control import Node, Wanted
from moeserve.loops import in_thread

_RESOURCES = ("CPU", "GPU")


class RayNodes:
    """Reservations of the hosts of `fleet` count as free."""

    def __init__(self, fleet: RayFleet) -> None:
        self._fleet = fleet

    async def list(self) -> list[Node]:
        """All live nodes, by id. A node that Ray drains is leaving."""
        own = self._fleet.reservations
        return await in_thread(_nodes, own)

    def ask_for(self, wanted: Wanted, num_hosts: int) -> None:
        """Ask the cluster's autoscaler, if there is one, to keep nodes for so many hosts, including existing ones; 0 = no request."""
        bundle = {resource: amount for resource, amount in (("CPU", wanted.cpus), ("GPU", wanted.gpus)) if amount}
        count = num_hosts if bundle else 0
        selectors = [dict(wanted.labels)] * count if wanted.labels else None
        request_resources(bundles=[bundle] * count, bundle_label_selectors=selectors)


def _nodes(own: Collection[str]) -> list[Node]:
    live = sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: str(node["NodeID"]))
    available, total, draining = available_resources(), total_resources(), draining_nodes()
    hostnames = Counter(node["NodeManagerHostname"] for node in live)
    return [
        Node(
            id=node["NodeID"],
            name=_name(node, hostnames),
            total={resource: node["Resources"].get(resource, 0.0) for resource in _RESOURCES},
            free={
                resource: available.get(node["NodeID"], node["Resources"]).get(resource, 0.0)
                + _reserved(total.get(node["NodeID"], {}), resource, own)
                for resource in _RESOURCES
            },
            labels=node["Labels"],
            is_leaving=node["NodeID"] in draining,
        )
        for node in live
    ]


def _reserved(total: Mapping[str, float], resource: str, own: Collection[str]) -> float:
    """The share of our placement groups on a node: Ray counts it as resources of other names, CPU_group_<id>."""
    return sum(total.get(f"{resource}_group_{group}", 0.0) for group in own)


def _name(node: Mapping[str, str], hostnames: Mapping[str, int]) -> str:
    """The host name, which is the pod's in Kubernetes; with the beginning of the id where several nodes share one."""
    hostname = node["NodeManagerHostname"]
    return hostname if hostnames[hostname] == 1 else f"{hostname}/{node['NodeID'][:8]}"
