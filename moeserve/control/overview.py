"""What there is, for people who ask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moeserve.control.frontends import FrontendInfo
from moeserve.control.seats import Seat
from moeserve.control.state import State
from moeserve.placement import Placement
from moeserve.standing import FrontendStanding, HostStanding, LayerStanding, Standing
from moeserve.stats import HostInfo, HostShards


def overview(
    state: State,
    is_changing: bool,
    shortage: str | None,
    layer_names: Sequence[str],
    present: Mapping[int, HostInfo],
    frontends: Sequence[FrontendInfo],
) -> Standing:
    """`present`: what hosts that are up have said of themselves."""
    release = state.release
    return Standing(
        epoch=release.epoch,
        wanted_hosts=str(state.num_hosts),
        is_changing=is_changing,
        shortage=shortage or "",
        hosts=[_host(seat, present.get(seat.number)) for seat in state.seats],
        frontends=[FrontendStanding(one.name, one.target, one.metrics_target, one.node, one.epoch, one.is_ready) for one in frontends],
        layers=[
            LayerStanding(name, release.revision(name), layer.tensor_parallel, _held(release.placement, number))
            for number, (name, layer) in enumerate(zip(layer_names, release.placement.layers, strict=True))
        ],
    )


def _host(seat: Seat, info: HostInfo | None) -> HostStanding:
    if info is None:
        return HostStanding(f"host-{seat.number}", seat.node, is_up=False)
    return HostStanding(info.name, info.node, True, info.pid, info.device, info.cuda_visible_devices, info.weights_bytes)


def _held(placement: Placement, layer: int) -> list[HostShards]:
    held = [(position, placement.layers[layer].shards_on(host)) for position, host in enumerate(placement.hosts)]
    return [HostShards(position, [one.expert for one in shards], [one.shard for one in shards]) for position, shards in held if shards]
