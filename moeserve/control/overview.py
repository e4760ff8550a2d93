"""What there is, for people who ask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moeserve.control.frontends import FrontendInfo
from moeserve.control.seats import Seat
from moeserve.control.state import State
from moeserve.standing import FrontendStanding, HostStanding, LayerStanding, Standing
from moeserve.stats import HostInfo, host_name


def overview(
    state: State,
    is_changing: bool,
    shortage: str,
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
        shortage=shortage,
        hosts=[_host(seat, present.get(seat.number)) for seat in state.seats],
        frontends=[FrontendStanding(one.name, one.target, one.metrics_target, one.node, one.epoch, one.is_ready) for one in frontends],
        layers=[
            LayerStanding(name, release.revision(name), layer.tensor_parallel, release.held(number))
            for number, (name, layer) in enumerate(zip(layer_names, release.placement.layers, strict=True))
        ],
    )


def _host(seat: Seat, info: HostInfo | None) -> HostStanding:
    if info is None:
        return HostStanding(host_name(seat.number), seat.node, is_up=False, number=seat.number)
    return HostStanding(info.name, info.node, True, info.pid, info.device, info.cuda_visible_devices, info.weights_bytes, seat.number)
