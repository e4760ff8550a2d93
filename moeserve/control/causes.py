"""Why hosts come and go, for people."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Final

from moeserve.control.assignments import Assignment, Node, Wanted
from moeserve.control.audit import Begun
from moeserve.control.reconcile import is_place
from moeserve.observe.stats import host_name

#: of hosts, in one sentence
_MAX_NAMES: Final = 8
#: of a node's name, or of its id in Ray
_NODE_CHARS: Final = 12


def cause_of(
    before: Sequence[Assignment], after: Sequence[Assignment], nodes: Sequence[Node], wanted: Wanted, given_up: Collection[int]
) -> Begun:
    """The change that the nodes ask for, whether it can be made or not: hosts that left or cannot stay, and those that come instead."""
    known = {node.id: node for node in nodes}
    gone = [assignment for assignment in before if assignment not in after]
    come = [assignment for assignment in after if assignment not in before]
    what = "; ".join(f"{where}: {_listed(which)}" for where, which in (("out", gone), ("in", come)) if which)
    lost = [_why(assignment, known, wanted, given_up) for assignment in before]
    reasons = [why for why in dict.fromkeys(lost) if why]
    why = ", ".join(reasons[:_MAX_NAMES]) or ("nodes have room for more hosts" if come else "fewer hosts fit on the nodes")
    return Begun("hosts", what or f"{wanted.num_hosts} wanted, {len(after)} assigned", why)


def _why(assignment: Assignment, nodes: Mapping[str, Node], wanted: Wanted, given_up: Collection[int]) -> str:
    """Why a host cannot stay where it is; "" = it can."""
    node, name = nodes.get(assignment.node), assignment.node[:_NODE_CHARS]
    if node is None:
        return f"node {name} is gone"
    if node.is_leaving:
        return f"node {name} is leaving"
    if not is_place(node, wanted):
        return f"node {name} does not have the labels of placement.node_labels"
    return f"{host_name(assignment.number)} was given up" if assignment.number in given_up else ""


def _listed(assignments: Sequence[Assignment]) -> str:
    names = [f"{host_name(each.number)} on {each.node[:_NODE_CHARS]}" for each in assignments[:_MAX_NAMES]]
    more = len(assignments) - len(names)
    return ", ".join(names) + (f" and {more} more" if more else "")
