"""The only room that imports ray: it starts or joins a cluster, watches its nodes, and turns a placement into host actors on them."""

from moeserve.cluster.fleet import Fleet
from moeserve.cluster.nodes import Nodes
from moeserve.cluster.runtime import RayRuntime

__all__ = ["Fleet", "Nodes", "RayRuntime"]
