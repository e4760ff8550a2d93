"""Hosts leave where those that stay have no room for old and new experts at once: these give away before they get."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial

from moeserve.control.audit import BroughtIn, ChangeStopped
from moeserve.control.changes import arrived, cost_of, placed
from moeserve.control.desired import Planner
from moeserve.control.room import require_room
from moeserve.control.stall import UNREADABLE, unless_stalled
from moeserve.control.state import State
from moeserve.errors import ConfigError, MoEServeError
from moeserve.loops import in_thread
from moeserve.placement import Placement, steps

#: from one state to the next; and which step of how many it is, in words
Change = Callable[[State], State]
BringIn = Callable[[Change, str], Awaitable[BroughtIn]]


async def in_steps(before: State, change: Change, planner: Planner, bring_in: BringIn) -> BroughtIn:
    """Brings in what `change` makes of `before`, in as many steps as it takes.

    Raises what `bring_in` raises for the first step, and ChangeStopped when a later one cannot be made.
    """

    def planned() -> tuple[State, list[Placement]]:
        after = change(before)
        return after, _between(before, after, planner)

    if planner.limit_bytes is None:
        return await bring_in(change, "")
    after, between = await unless_stalled(in_thread(planned), lambda: None, planner.placing.load_timeout_s, lambda: UNREADABLE)
    if not between:
        return await bring_in(change, "")
    changes = [*(partial(placed, placement=placement) for placement in between), partial(arrived, after=after)]
    made: list[BroughtIn] = []
    for number, each in enumerate(changes, 1):
        try:
            made.append(await bring_in(each, f", step {number} of {len(changes)}"))
        except MoEServeError as error:
            if not made:
                raise
            why = f"step {number} of {len(changes)} cannot be made, and what has moved until then stays: {error}"
            raise ChangeStopped(why, await in_thread(cost_of, before, replace(before, release=made[-1].release), planner)) from error
    return replace(made[-1], cost=await in_thread(cost_of, before, after, planner))


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
