"""The nodes of programs that are not hosts: options of their actors."""

from __future__ import annotations

from typing import Any

import ray
import ray.util
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


def on_head() -> dict[str, Any]:
    """The node whose address is that of the cluster; when it has been replaced, the new one."""
    return {"resources": {"node:__internal_head__": 0.001}}


def on_this_node() -> dict[str, Any]:
    """On this node only."""
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(this_node(), soft=False)}


def spread() -> dict[str, Any]:
    """On as many nodes as there are."""
    return {"scheduling_strategy": "SPREAD"}


def this_node() -> str:
    """The id of the Ray node that this process is on."""
    node_id: str = ray.get_runtime_context().get_node_id()
    return node_id


def node_address() -> str:
    """The address by which other nodes know this one."""
    address: str = ray.util.get_node_ip_address()
    return address
