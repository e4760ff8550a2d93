"""Hosts leave, or are gone, or get other copies, and have no room for old and new experts at once: they give away before they get."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import replace
from functools import partial

from moeserve.control.audit import BroughtIn, ChangeStopped
from moeserve.control.changes import arrived, cost_of, placed
from moeserve.control.desired import Planner
from moeserve.control.fleet import HostFleet
from moeserve.control.room import require_room
from moeserve.control.stall import UNREADABLE, unless_stalled
from moeserve.control.state import State
from moeserve.errors import ConfigError, MoEServeError
from moeserve.loops import in_thread
from moeserve.placement import Placement, Transition, steps, without_surplus

#: from one state to the next; which step of how many it is, in words; the hosts that are gone, and leave in a later one
Change = Callable[[State], State]
BringIn = Callable[[Change, str, Collection[int]], Awaitable[BroughtIn]]


async def in_steps(before: State, change: Change, planner: Planner, bring_in: BringIn, hosts: HostFleet) -> BroughtIn:
    """Brings in what `change` makes of `before`, in as many steps as it takes; two at most, if not all hosts are up.

    Raises what `bring_in` raises for the first step, and ChangeStopped when a later one cannot be made.
    """

    def planned() -> tuple[State, list[Placement]]:
        after = change(before)
        return after, placements_between(before, after, planner, down)

    down = {assignment.number for assignment in before.assignments}.difference(hosts.present)
    if planner.limit_bytes is None:
        return await bring_in(change, "", ())
    after, between = await unless_stalled(in_thread(planned), lambda: None, planner.placing.load_timeout_s, lambda: UNREADABLE)
    if not between:
        return await bring_in(change, "", ())
    gone = set(hosts.given_up).difference(assignment.number for assignment in after.assignments)
    changes = [*(partial(placed, placement=placement) for placement in between), partial(arrived, after=after)]
    made: list[BroughtIn] = []
    for number, each in enumerate(changes, 1):
        try:
            made.append(await bring_in(each, f", step {number} of {len(changes)}", () if number == len(changes) else gone))
        except MoEServeError as error:
            if not made:
                raise
            why = f"step {number} of {len(changes)} cannot be made, and what has moved until then stays: {error}"
            raise ChangeStopped(why, await in_thread(_cost, before, replace(before, release=made[-1].release), planner, made)) from error
    return replace(made[-1], cost=await in_thread(_cost, before, after, planner, made))


def _cost(before: State, after: State, planner: Planner, made: Sequence[BroughtIn]) -> Transition | None:
    """With what hosts read in all steps: copies that had to make room have come back."""
    cost = cost_of(before, after, planner)
    return cost and replace(cost, moved_bytes=sum(each.cost.moved_bytes for each in made if each.cost is not None))


def placements_between(before: State, after: State, planner: Planner, down: Collection[int]) -> list[Placement]:
    """The placements through which hosts have room from `before` to `after`, on the hosts of `before`.

    Empty where one step has room, where no steps lead there, or where hosts join while none is `down`. If one is, the only one: nobody
    waits longer than needed for what dead hosts held.
    """
    is_thinned = bool(down) or set(after.assignments) <= set(before.assignments)
    if not is_thinned or after.release is before.release or _has_room(before, after, planner):
        return []
    old, new = before.release.placement, after.release.placement
    if down:
        between = [without_surplus(old, new, down)]
    else:
        memory = planner.with_copies(before.copies).memory(after.assignments)
        between = steps(planner.sizes(before.release.sources(planner.layers)), old, new, None, memory)[:-1]
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
