"""The only room that imports ray: it starts or joins a cluster, watches its nodes, and turns a placement into host actors on them."""

from moeserve.cluster.fleet import Fleet
from moeserve.cluster.loss import Loss, until_lost
from moeserve.cluster.nodes import Nodes
from moeserve.cluster.resident import Resident, end_this_process, settle
from moeserve.cluster.runtime import RayRuntime
from moeserve.cluster.store import Store
from moeserve.cluster.sweep import sweep
from moeserve.cluster.where import node_address, on_head, on_this_node, spread, this_node

__all__ = [
    "Fleet",
    "Loss",
    "Nodes",
    "RayRuntime",
    "Resident",
    "Store",
    "end_this_process",
    "node_address",
    "on_head",
    "on_this_node",
    "settle",
    "spread",
    "sweep",
    "this_node",
    "until_lost",
]
