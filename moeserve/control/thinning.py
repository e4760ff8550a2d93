"""Hosts leave where those that stay have no room for old and new experts at once: these give away before they get."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial

from moeserve.control.audit import BroughtIn
from moeserve.control.changes import arrived, cost_of, placed
from moeserve.control.desired import Planner
from moeserve.control.room import require_room
from moeserve.control.stall import UNREADABLE, unless_stalled
from moeserve.control.state import State
from moeserve.errors import ConfigError
from moeserve.loops import in_thread
from moeserve.placement import Placement, steps

#: from one state to the next; and which step of how many it is, in words
Change = Callable[[State], State]
BringIn = Callable[[Change, str], Awaitable[BroughtIn]]


async def in_steps(before: State, change: Change, planner: Planner, bring_in: BringIn) -> BroughtIn:
    """Brings in what `change` makes of `before`, in as many steps as it takes. Raises what `bring_in` raises; what has moved then stays."""

    def planned() -> tuple[State, list[Placement]]:
        after = change(before)
        return after, _between(before, after, planner)

    if planner.limit_bytes is None:
        return await bring_in(change, "")
    after, between = await unless_stalled(in_thread(planned), lambda: None, planner.placing.load_timeout_s, lambda: UNREADABLE)
    if not between:
        return await bring_in(change, "")
    number = len(between) + 1
    for done, placement in enumerate(between, 1):
        await bring_in(partial(placed, placement=placement), f", step {done} of {number}")
    last = await bring_in(partial(arrived, after=after), f", step {number} of {number}")
    return replace(last, cost=await in_thread(cost_of, before, after, planner))


def _between(before: State, after: State, planner: Planner) -> list[Placement]:
    """The placements through which hosts have room from `before` to `after`, on the hosts of `before`.

    Empty where one step has room, where hosts join, or where no steps lead there.
    """
    if not set(after.assignments) < set(before.assignments) or _has_room(before, after, planner):
        return []
    sizes = planner.sizes(before.release.sources(planner.layers))
    between = steps(sizes, before.release.placement, after.release.placement, None, planner.limit_bytes)[:-1]
    state = before
    for placement in between:
        following = placed(state, placement)
        if not _has_room(state, following, planner):
            return []
        state = following
    return between if _has_room(state, after, planner) else []


def _has_room(before: State, after: State, planner: Planner) -> bool:
    try:
        require_room(before, after, planner)
    except ConfigError:
        return False
    return True
