"""Why hosts do not fit, in one sentence: the desired state, the room on each node, and what is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moeserve.control.assignments import Node, Wanted
from moeserve.errors import number_of

_MAX_NODES = 8


def describe(nodes: Sequence[Node], room: Mapping[str, int], wanted: Wanted, number: int) -> str:
    """`room`: how many hosts fit on each allowed node, by its id; `number`: how many there should be."""
    asked = f"placement.num_hosts is {wanted.num_hosts!r}, and the experts need {number_of(number, 'host')}"
    asked = asked if wanted.num_hosts == "all" else f"placement.num_hosts is {number}"
    each = " and ".join(f"placement.{key} = {amount:g}" for key, _, amount in _resources(wanted))
    each = f" and each takes {each}" if each else ""
    fit = sum(room.values())
    there = [_node(node, room.get(node.id), wanted) for node in nodes]
    if len(there) > _MAX_NODES:
        there = [*there[:_MAX_NODES], f"and {len(there) - _MAX_NODES} more nodes"]
    nodes_are = "; ".join(there) or "there are no nodes"
    return f"{asked}{each}, but there is room for {fit}: {nodes_are}. Missing: {_missing(wanted, number - fit)}"


def _resources(wanted: Wanted) -> list[tuple[str, str, float]]:
    """Key of the configuration, name of the resource, amount for one host."""
    both = (("cpus_per_host", "CPU", wanted.cpus), ("gpus_per_host", "GPU", wanted.gpus))
    return [(key, resource, amount) for key, resource, amount in both if amount]


def _node(node: Node, room: int | None, wanted: Wanted) -> str:
    if node.is_leaving:
        return f"node {node.name} is leaving"
    if room is None:
        return f"node {node.name} does not have the labels {_labels(wanted)}"
    amounts = [
        f"{node.free.get(resource, 0):g} of {node.total.get(resource, 0):g} {resource}s free" for _, resource, _ in _resources(wanted)
    ]
    why = [*amounts, "at most one"] if wanted.strategy == "strict_spread" else amounts
    return f"node {node.name} has room for {room}" + (f" ({', '.join(why)})" if why else "")


def _missing(wanted: Wanted, hosts: int) -> str:
    where = f" on nodes with the labels {_labels(wanted)}" if wanted.labels else ""
    if wanted.strategy == "strict_spread":
        nodes = "1 more node" if hosts == 1 else f"{hosts} more nodes"
        return f"{nodes}{where and f' with the labels {_labels(wanted)}'} (placement.node_strategy is 'strict_spread')"
    amounts = [f"{hosts * amount:g} {resource}{'' if hosts * amount == 1 else 's'}" for _, resource, amount in _resources(wanted)]
    return (" and ".join(amounts) or "a node") + where


def _labels(wanted: Wanted) -> str:
    return ", ".join(f"{key}={value}" for key, value in wanted.labels.items())
