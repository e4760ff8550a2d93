"""`moeserve plan`: what would be started, without starting it."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from moeserve.checkpoints import layer_sources
from moeserve.cli.flags import Overrides
from moeserve.config import load_config
from moeserve.placement import host_bytes, plan_placement


def plan(
    source: Annotated[str, typer.Argument(help="A TOML configuration or a checkpoint folder.")],
    overrides: Overrides,
) -> None:
    """Show the layers, which host would hold which experts, and the memory that takes."""
    config = load_config(source, overrides)
    specs = [layer.spec for layer in layer_sources(config)]
    placement = plan_placement(specs, config.placement)

    layers = Table("", "layer", title=f"{len(specs)} MoE layers", title_justify="left", box=SIMPLE_HEAD)
    for column in ("H x I", "experts", "type", "capacity"):
        layers.add_column(column, justify="right", no_wrap=True)
    for number, spec in enumerate(specs):
        factor = spec.gating.capacity_factor
        layers.add_row(
            str(number),
            spec.name,
            f"{spec.hidden_size} x {spec.intermediate_size}",
            f"{spec.num_experts}, top {spec.gating.top_k}",
            f"{spec.activation} {spec.dtype}",
            "unlimited" if factor is None else f"factor {factor:g}",
        )

    hosts = Table("host", title=f"{placement.num_hosts} hosts", title_justify="left", box=SIMPLE_HEAD)
    for column in ("GPUs", "CPUs", "experts", "expected load", "weights", "of layer 0"):
        hosts.add_column(column, justify="right")
    for number in range(placement.num_hosts):
        held = [layer.experts_on(number) for layer in placement.layers]
        share = sum(len(experts) / spec.num_experts for experts, spec in zip(held, specs, strict=True)) / len(specs)
        hosts.add_row(
            f"host-{number}",
            f"{config.placement.gpus_per_host:g}",
            f"{config.placement.cpus_per_host:g}",
            str(sum(map(len, held))),
            f"{share:.0%}",
            f"{host_bytes(specs, placement, number) / 2**20:.1f} MiB",
            ", ".join(map(str, held[0])),
        )
    console = Console()
    console.print(layers)
    console.print(hosts)
