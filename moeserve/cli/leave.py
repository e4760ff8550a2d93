"""`moeserve leave`: move hosts off a node of the cluster before it stops."""

from __future__ import annotations

from typing import Annotated

import typer

from moeserve.cli.signals import preparing
from moeserve.cli.streams import say


def leave(
    address: Annotated[str, typer.Option(help="The Ray cluster: host:port, or auto.")] = "auto",
    namespace: Annotated[str, typer.Option(help="ray.namespace of the deployed service.")] = "moeserve",
    timeout_s: Annotated[float, typer.Option(min=0, max=1e9, help="How long to wait for hosts to leave.")] = 300.0,
    node: Annotated[str | None, typer.Option(help="Ray's id of the node; default: the node on this machine.")] = None,
) -> None:
    """Tell Ray that this node drains, and wait until no expert host of a deployed service is left on it."""
    with preparing():
        from moeserve.cluster.ray_leave import leave as leave_node

    leave_node(address, namespace, timeout_s, node)
    say("no expert host is left on this node")
