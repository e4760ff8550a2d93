"""The only room that imports ray: it starts or joins a cluster, watches its nodes, and turns a placement into host actors on them."""

from moeserve.cluster.ray_fleet import Fleet
from moeserve.cluster.ray_loss import Loss, until_lost
from moeserve.cluster.ray_nodes import RayNodes
from moeserve.cluster.ray_program import ProgramActor, end_this_process, start_program
from moeserve.cluster.ray_runtime import RayRuntime
from moeserve.cluster.ray_store import Store
from moeserve.cluster.ray_sweep import sweep
from moeserve.cluster.ray_where import node_address, on_head, on_this_node, spread, this_node

__all__ = [
    "Fleet",
    "Loss",
    "ProgramActor",
    "RayNodes",
    "RayRuntime",
    "Store",
    "end_this_process",
    "node_address",
    "on_head",
    "on_this_node",
    "spread",
    "start_program",
    "sweep",
    "this_node",
    "until_lost",
]
