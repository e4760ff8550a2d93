"""The cluster of a configuration."""

from __future__ import annotations

from pkgutil import resolve_name
from typing import Any, Final

from moeserve.cluster.cluster import Cluster
from moeserve.cluster.fault_injector import FaultInjector
from moeserve.config import ServedModel, ServiceConfig
from moeserve.errors import explained

#: by cluster.kind; imported when needed, because threads need no Ray
_KINDS: Final = {"ray": "moeserve.cluster.ray_cluster:RayCluster", "threads": "moeserve.cluster.threads:ThreadCluster"}
_FAULT_INJECTORS: Final = {
    "ray": "moeserve.cluster.ray_fault_injector:RayFaultInjector",
    "threads": "moeserve.cluster.thread_fault_injector:ThreadFaultInjector",
}


def cluster_of(config: ServiceConfig) -> Cluster:
    """The cluster that `serve` runs hosts on, not started yet."""
    kind = _imported(_KINDS[config.cluster.kind])
    cluster: Cluster = kind(config.only(ServedModel), config.placement, config.ray)
    return cluster


def fault_injector_of(config: ServiceConfig, cluster: Cluster) -> FaultInjector:
    """Breaks the hosts of a cluster that `cluster_of` has made."""
    kind = _imported(_FAULT_INJECTORS[config.cluster.kind])
    injector: FaultInjector = kind(cluster.hosts)
    return injector


def _imported(path: str) -> Any:
    try:
        return resolve_name(path)
    except ModuleNotFoundError as error:
        raise explained(error, 'cluster.kind = "ray"') from None
