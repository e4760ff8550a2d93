"""The status of a service, from the state of its controller."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moeserve.control.assignments import Assignment
from moeserve.control.demand import LayerLoads
from moeserve.control.follow import Report
from moeserve.control.state import State
from moeserve.observe.stats import HostInfo, facts, host_name
from moeserve.observe.status import FrontendStatus, HostStatus, LayerStatus, ServiceStatus
from moeserve.release import Release


def status_of(
    state: State,
    changing: str,
    shortage: str,
    layers: Sequence[LayerStatus],
    present: Mapping[int, HostInfo],
    frontends: Sequence[Report],
) -> ServiceStatus:
    """`present`: the hosts that are up, as they describe themselves."""
    release = state.release
    return ServiceStatus(
        epoch=release.epoch,
        wanted_hosts=str(state.num_hosts),
        is_changing=bool(changing),
        changing=changing,
        shortage=shortage,
        hosts=[_host(assignment, present.get(assignment.number)) for assignment in state.assignments],
        frontends=[FrontendStatus(one.name, one.target, one.metrics_target, one.node, one.epoch, one.is_ready) for one in frontends],
        layers=layers,
    )


def layers_of(release: Release, names: Sequence[str], load: LayerLoads) -> list[LayerStatus]:
    """The layers, and what is asked of them."""
    return [
        LayerStatus(
            name=name,
            model_revision=release.revision(name),
            tensor_parallel=layer.tensor_parallel,
            placement=release.held(number),
            copies=layer.num_copies.tolist(),
            demand_rows_per_s=load.rows_per_s[number].tolist(),
            host_balancedness=load.host_balancedness[number],
        )
        for number, (name, layer) in enumerate(zip(names, release.placement.layers, strict=True))
    ]


def _host(assignment: Assignment, info: HostInfo | None) -> HostStatus:
    if info is None:
        return HostStatus(host_name(assignment.number), is_up=False, number=assignment.number, node=assignment.node)
    return HostStatus(info.name, True, info.pid, assignment.number, **facts(info))
