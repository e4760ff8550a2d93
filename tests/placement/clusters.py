"""Imagined clusters and loads to plan for, and what holds of every plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from moeserve.placement import Constraints, HostLimits, LayerSize, Placement

Rows = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Case:
    """What a plan is made from."""

    sizes: list[LayerSize]
    constraints: Constraints
    demand: list[Rows | None] | None


def sizes_of(num_layers: int, num_experts: int, nbytes: int = 10) -> list[LayerSize]:
    return [LayerSize(f"layer {number}", np.full(num_experts, nbytes)) for number in range(num_layers)]


def constraints_on(sizes: Sequence[LayerSize], hosts: Sequence[HostLimits], copies: int = 1, tensor_parallel: int = 1) -> Constraints:
    """At least so many copies of every expert, at most one on each host."""
    experts = [len(size.unit_bytes) // tensor_parallel for size in sizes]
    least, most = (tuple(np.full(number, each) for number in experts) for each in (copies, len(hosts)))
    return Constraints(tuple(hosts), least, most, tensor_parallel=tensor_parallel)


def hosts_of(*numbers: int) -> list[HostLimits]:
    return [HostLimits(number) for number in numbers]


def zipf(num_layers: int, num_experts: int, exponent: float, seed: int = 0) -> list[Rows]:
    drawn = np.random.default_rng(seed)
    return [1000 * drawn.permutation(np.arange(1, num_experts + 1) ** -exponent) for _ in range(num_layers)]


def pairs(placement: Placement) -> set[tuple[int, int, int]]:
    """Layer, unit and host of every physical expert."""
    return {
        (number, unit, host)
        for number, layer in enumerate(placement.layers)
        for unit, host in zip(layer.unit_of_physical.tolist(), layer.host_of_physical.tolist(), strict=True)
    }


def assert_kept(case: Case, placement: Placement) -> None:
    """Every expert is placed, copies are apart, and neither the budget nor the room of a host is exceeded."""
    limits, shards = case.constraints, case.constraints.tensor_parallel
    room = {host.number: host.memory_bytes for host in limits.hosts}
    assert set(placement.hosts) == set(room)
    held = Counter[int]()
    for number, (size, layer) in enumerate(zip(case.sizes, placement.layers, strict=True)):
        physical = list(zip(layer.unit_of_physical.tolist(), layer.host_of_physical.tolist(), strict=True))
        assert len(set(physical)) == len(physical)
        copies = np.bincount(layer.unit_of_physical, minlength=len(size.unit_bytes)).reshape(-1, shards)
        assert (copies == copies[:, :1]).all()
        assert (limits.least_copies[number] <= copies[:, 0]).all()
        assert (copies[:, 0] <= limits.most_copies[number]).all()
        # Of as many shards of an expert as it has copies, each can be of another copy.
        together = Counter((unit // shards, host) for unit, host in physical)
        assert all(number <= copies[expert, 0] for (expert, _), number in together.items())
        on_host = Counter(host for _, host in physical)
        assert limits.experts_per_host is None or max(on_host.values()) <= limits.experts_per_host
        for unit, host in physical:
            held[host] += int(size.unit_bytes[unit])
        held.update(dict.fromkeys(on_host, size.shared_bytes))
    assert all(limit is None or held[host] <= limit for host, limit in room.items())
    least = sum(int(each.sum()) for each in limits.least_copies)
    logical = sum(map(len, limits.least_copies))
    assert len(pairs(placement)) <= shards * max(least + logical * limits.extra_copies, (1 + limits.extra_copies) * logical)


@st.composite
def cases(draw: st.DrawFn, *, is_bounded: bool = True) -> Case:
    num_hosts = draw(st.integers(2, 7))
    shards = draw(st.integers(1, min(3, num_hosts)))
    experts = draw(st.lists(st.integers(num_hosts, 20), min_size=1, max_size=3))
    drawn = np.random.default_rng(draw(st.integers(0, 2**32)))
    sizes = [
        LayerSize(f"layer {number}", np.repeat(drawn.integers(1, draw(st.sampled_from([2, 6])), each), shards), draw(st.integers(0, 3)))
        for number, each in enumerate(experts)
    ]
    memory = st.none() | st.integers(1, 1 + 3 * sum(int(size.unit_bytes.sum()) for size in sizes) // num_hosts)
    numbers = sorted(draw(st.sets(st.integers(0, 20), min_size=num_hosts, max_size=num_hosts)))
    hosts = [HostLimits(number, draw(memory) if is_bounded else None, draw(st.sampled_from(["", "a", "b"]))) for number in numbers]
    least = tuple(drawn.integers(1, 1 + draw(st.integers(1, 2)), each) for each in experts)
    constraints = Constraints(
        tuple(hosts),
        least,
        tuple(np.maximum(each, drawn.integers(1, num_hosts + 1, len(each))) for each in least),
        extra_copies=draw(st.sampled_from([0.0, 0.25, 0.5, 2.0])),
        experts_per_host=draw(st.none() | st.integers(4, 20)) if is_bounded else None,
        tensor_parallel=shards,
        pipeline_stages=draw(st.integers(1, 2)) if num_hosts >= 2 * max(2, shards) and len(experts) > 1 else 1,
    )
    return Case(sizes, constraints, draw(st.none() | st.just([rows_of(drawn, each) for each in experts])))


def rows_of(drawn: np.random.Generator, num_experts: int) -> Rows | None:
    kind = drawn.integers(4)
    if kind == 0:
        return None
    if kind == 1:
        return drawn.lognormal(0, 2, num_experts)
    if kind == 2:
        return drawn.integers(0, 3, num_experts).astype(np.float64)
    return drawn.permutation(np.arange(1, num_experts + 1) ** -1.2)
