"""The only room that imports ray: it starts or joins a cluster, and turns a placement into host actors."""

from moeserve.cluster.fleet import Fleet
from moeserve.cluster.runtime import RayRuntime

__all__ = ["Fleet", "RayRuntime"]
