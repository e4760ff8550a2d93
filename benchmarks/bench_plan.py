"""The planner: how long it takes, what it moves, and how even hosts are loaded after it.

`python benchmarks/bench_plan.py [--json]`. Layers x experts on hosts, with so many extra copies; loads of the experts of a layer by
Zipf's law with the exponent, in another order for each layer. afresh: there is no placement yet; changed: from one that knows no load;
again: the same once more. seconds: of CPU time. moves: experts that change their host; new: further copies; peak: the most
that a host holds while the change happens in one step, and in steps of 1/20 of a host's share for each host, divided by the share.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from moeserve.compat.eplb import rebalance_experts
from moeserve.placement import Constraints, HostLimits, LayerSize, Placement, balancedness, peak_bytes, plan, steps, transition

T = TypeVar("T")
Demand = list[npt.NDArray[np.float64]]
NBYTES = 10_000


@dataclass(frozen=True)
class Row:
    """One plan. balanced_before, balanced: balancedness of the hosts; peak, peak_in_steps: divided by a host's share."""

    what: str
    seconds: float
    moves: int | None = None
    new: int | None = None
    balanced_before: float | None = None
    balanced: float | None = None
    peak: float | None = None
    peak_in_steps: float | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    rows = [*changes_of_hosts(), *balanced(), *eplb()]
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        Console(width=140).print(table(rows))


def changes_of_hosts() -> Iterator[Row]:
    """No load is known."""
    sizes = sizes_of(58, 256)
    limits = constraints(sizes, range(32))
    before, seconds = timed(lambda: plan(sizes, limits))
    yield Row("58 x 256 on 32 hosts, the first plan", seconds)
    for what, hosts in (
        ("32 -> 33 hosts", range(33)),
        ("one of 32 hosts lost", range(1, 32)),
        ("one of 32 hosts replaced", range(1, 33)),
        ("32 -> 64 hosts", range(64)),
    ):
        limits = constraints(sizes, hosts)
        after, seconds = timed(lambda: plan(sizes, limits, None, before))  # noqa: B023
        yield changed(what, seconds, sizes, before, after)


def balanced() -> Iterator[Row]:
    """From the plan without a load to the one for it."""
    for layers, experts, hosts, extra, exponent in (
        (1, 16, 4, 0.5, 1.2),
        (58, 256, 32, 0.125, 0.8),
        (58, 256, 32, 0.25, 1.2),
        (61, 256, 320, 0.25, 0.5),
        (61, 256, 320, 1.0, 0.8),
        (61, 256, 10_000, 0.25, 0.5),
        (61, 256, 10_000, 40.0, 0.8),
    ):
        sizes, demand = sizes_of(layers, experts), zipf(layers, experts, exponent)
        limits = replace(constraints(sizes, range(hosts)), extra_copies=extra)
        what = f"{layers} x {experts} on {hosts}, +{extra:.0%}, zipf {exponent}"
        fresh, seconds = timed(lambda: plan(sizes, limits, demand))  # noqa: B023
        yield Row(f"{what}: afresh", seconds, balanced=balancedness(fresh, demand))
        before = plan(sizes, limits)
        after, seconds = timed(lambda: plan(sizes, limits, demand, before))  # noqa: B023
        row = changed(f"{what}: changed", seconds, sizes, before, after)
        yield replace(row, balanced_before=balancedness(before, demand), balanced=balancedness(after, demand))
        again, seconds = timed(lambda: plan(sizes, limits, demand, after))  # noqa: B023
        assert again is after, "planned twice, nothing moves"
        yield Row(f"{what}: again", seconds, 0, 0)


def eplb() -> Iterator[Row]:
    """As DeepSeek-V3 was served: prefill with 8 groups on 4 nodes, decode with any expert anywhere."""
    weight = np.stack(zipf(58, 256, 0.8))
    for what, replicas, groups, nodes, gpus in (("prefill", 288, 8, 4, 32), ("decode", 320, 8, 40, 320)):
        (physical, _, count), seconds = timed(lambda: rebalance_experts(weight, replicas, groups, nodes, gpus))  # noqa: B023
        shares = np.take_along_axis(weight / count.numpy(), physical.numpy(), 1).reshape(58, gpus, -1).sum(axis=2)
        yield Row(f"EPLB, {what}: 58 x 256 on {gpus} GPUs", seconds, balanced=float((shares.mean(axis=1) / shares.max(axis=1)).mean()))


def changed(what: str, seconds: float, sizes: Sequence[LayerSize], before: Placement, after: Placement) -> Row:
    change = transition(sizes, before, after)
    share = sum(len(layer.unit_of_physical) for layer in after.layers) * NBYTES / len(after.hosts)
    made = steps(sizes, before, after, max(NBYTES, int(share * len(after.hosts) / 20)))
    in_steps = max(peak_bytes(sizes, [before, *made]).values()) / share if len(made) < 100 else None
    return Row(what, seconds, change.moves, change.new, peak=max(change.peak_bytes.values()) / share, peak_in_steps=in_steps)


def timed(work: Callable[[], T]) -> tuple[T, float]:
    start = time.process_time()
    result = work()
    return result, time.process_time() - start


def sizes_of(num_layers: int, num_experts: int) -> list[LayerSize]:
    return [LayerSize(f"layer {number}", np.full(num_experts, NBYTES)) for number in range(num_layers)]


def constraints(sizes: Sequence[LayerSize], hosts: range) -> Constraints:
    least, most = (tuple(np.full(len(size.unit_bytes), number) for size in sizes) for number in (1, len(hosts)))
    return Constraints(tuple(map(HostLimits, hosts)), least, most)


def zipf(num_layers: int, num_experts: int, exponent: float) -> Demand:
    drawn = np.random.default_rng(0)
    return [drawn.permutation(np.arange(1, num_experts + 1) ** -exponent) for _ in range(num_layers)]


def table(rows: Sequence[Row]) -> Table:
    made = Table("plan", *(column.replace("_", " ") for column in list(asdict(rows[0]))[1:]))
    for row in rows:
        values = list(asdict(row).values())
        cells = ("" if value is None else f"{value:.3f}" if isinstance(value, float) else f"{value}" for value in values[1:])
        made.add_row(values[0], *cells)
    return made


if __name__ == "__main__":
    main()
