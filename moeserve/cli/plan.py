"""`moeserve plan`: show what would be started, and start nothing."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from moeserve.cli.flags import Overrides, with_config_flags
from moeserve.cli.signals import preparing
from moeserve.config import ServedModel, load_config


@with_config_flags()
def plan(
    source: Annotated[str, typer.Argument(help="A TOML configuration or a checkpoint folder.")],
    overrides: Overrides,
    with_kernels: Annotated[bool, typer.Option("--kernels", help="Also measure the fastest kernel for the experts here.")] = False,
    from_hosts: Annotated[int | None, typer.Option(min=1, help="Also show what a change from this many hosts would move.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object: hosts, their bytes, and what a change would move.")] = False,
) -> None:
    """Show the layers, their gates, the experts of each host and their memory; fail when they do not fit."""
    config = load_config(source, overrides)
    with preparing():
        from moeserve.checkpoints import ServedLayers, check_memory, host_bytes, in_memory, layer_sources, memory_bytes
        from moeserve.cli import plan_change
        from moeserve.cli.columns import WHOLE, console
        from moeserve.cli.plan_view import spill_text, tables
        from moeserve.control import Planner
        from moeserve.placement import plan_placement

    is_here, sources = config.ray.address is None, layer_sources(config)
    placement = plan_placement([layer.spec for layer in sources], config.placement)
    nbytes, number = host_bytes(sources, placement), placement.num_hosts
    held = in_memory(nbytes, sources, config.placement, config.store)
    change = None
    if from_hosts is not None:
        planner = Planner(ServedLayers(config.only(ServedModel), sources), config.placement, is_here, config.balancing)
        change = plan_change.planned_change(planner, from_hosts, number)
    if as_json:
        sizes = {"weights_bytes_per_host": nbytes, "memory_bytes_per_host": held}
        print(json.dumps({"hosts": number, **sizes, **(plan_change.as_json(change) if change else {})}))
    else:
        shown = console(WHOLE)
        for table in tables(sources, placement, config.placement, nbytes, with_kernels):
            shown.print(table)
        if change is not None and from_hosts is not None:
            shown.print(plan_change.as_text(change, from_hosts, number))
        if sum(held) < sum(nbytes):
            shown.print(spill_text(nbytes, held))
    check_memory(held, config.placement, memory_bytes() if is_here else None)
