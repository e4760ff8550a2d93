"""A plan as tables: the layers, their gates, the experts of each host and their memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from moeserve.checkpoints import LayerSource
from moeserve.cli.columns import bytes_text
from moeserve.cli.gates import gates
from moeserve.cli.kernels import kernels
from moeserve.config import GatingConfig, PlacementConfig
from moeserve.errors import number_of
from moeserve.experts import ExpertShard
from moeserve.observe.stats import host_name
from moeserve.placement import LayerPlacement, Placement


def tables(
    sources: Sequence[LayerSource], placement: Placement, config: PlacementConfig, nbytes: Sequence[int], with_kernels: bool
) -> Iterator[Table]:
    """nbytes: of the weights on each host. `with_kernels`: also times of kernels, measured on this machine, which takes a while."""
    yield _layers(sources)
    yield gates(sources)
    yield _hosts(placement, config, nbytes)
    if with_kernels:
        yield from kernels(sources, config)


def spill_text(nbytes: Sequence[int], held: Sequence[int]) -> str:
    """Two sentences on hosts whose weights are not all `held` in memory."""
    return (
        f"Experts spill: {bytes_text(sum(held))} of {bytes_text(sum(nbytes))} are in memory, at most {bytes_text(max(held))} on a host. "
        "Hosts read the others from the checkpoint when rows need them."
    )


def _layers(sources: Sequence[LayerSource]) -> Table:
    table = Table("", title=number_of(len(sources), "MoE layer"), title_justify="left", box=SIMPLE_HEAD)
    table.add_column("layer", overflow="fold")
    for column in ("H x I", "experts", "type", "capacity"):
        table.add_column(column, justify="right", no_wrap=True)
    for number, source in enumerate(sources):
        spec = source.spec
        table.add_row(
            str(number),
            spec.name,
            f"{spec.hidden_size} x {spec.intermediate_size}",
            f"{spec.num_experts}, top {spec.gating.top_k}",
            f"{spec.expert_kind} {source.held_as}",
            _capacity(spec.gating),
        )
    return table


def _hosts(placement: Placement, config: PlacementConfig, nbytes: Sequence[int]) -> Table:
    title = number_of(placement.num_hosts, "host")
    table = Table("host", title=title, title_justify="left", box=SIMPLE_HEAD)
    for column in ("GPUs", "CPUs", "experts", "expected load", "weights", "of layer 0"):
        table.add_column(column, justify="right")
    for number in range(placement.num_hosts):
        held = [layer.shards_on(number) for layer in placement.layers]
        share = sum(_share(layer, number) for layer in placement.layers) / len(placement.layers)
        table.add_row(
            host_name(number),
            f"{config.gpus_per_host:g}",
            f"{config.cpus_per_host:g}",
            str(sum(map(len, held))),
            f"{share:.0%}",
            f"{nbytes[number] / 2**20:.1f} MiB",
            ", ".join(map(_name, held[0])),
        )
    return table


def _capacity(gating: GatingConfig) -> str:
    factor = gating.capacity_factor if gating.drop_tokens else None
    return "unlimited" if factor is None else f"factor {factor:g}"


def _share(layer: LayerPlacement, host: int) -> float:
    """The host's share of the layer's work, if experts and their copies have equal load."""
    on_host = layer.unit_of_physical[layer.host_of_physical == host]
    copies = (layer.copies >= 0).sum(axis=1)
    return float((1 / copies[on_host]).sum()) / layer.num_units


def _name(shard: ExpertShard) -> str:
    return str(shard.expert) if shard.of == 1 else f"{shard.expert}/{shard.shard}"
