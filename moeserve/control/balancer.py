"""Experts follow the load: rounds of balancing, by themselves and by hand."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Final, Protocol

import numpy as np

from moeserve.control import timing
from moeserve.control.audit import AuditLog, Begun
from moeserve.control.demand import Demand, LayerLoads
from moeserve.control.desired import Planner, Rows
from moeserve.control.frontends import Frontends
from moeserve.control.record import read_counts
from moeserve.control.rounds import Round, RoundStopped, planned_round, stepped
from moeserve.control.slowdown import Slowdown
from moeserve.control.stall import UNREADABLE, unless_stalled
from moeserve.control.state import State
from moeserve.errors import InvalidRequest, number_of
from moeserve.log_limit import limited_logger
from moeserve.loops import in_thread
from moeserve.observe.audit import ADMINISTRATOR
from moeserve.observe.balancing import Outcome
from moeserve.observe.status import Rebalanced
from moeserve.placement import layer_balancedness, mean_balancedness
from moeserve.release import Release

log = logging.getLogger(__name__)
strangers = limited_logger(__name__)

#: a smaller gain cannot be told from chance, and a larger one only when it is so many standard deviations of a host's load
_LEAST_GAIN: Final = 0.02
_DEVIATIONS: Final = 3.0
#: of hosts, in one sentence
_MAX_NAMES: Final = 8


class Balanced(Protocol):
    """The service that is balanced."""

    @property
    def state(self) -> State:
        """What is served."""
        ...

    @property
    def down(self) -> Sequence[str]:
        """Names of the hosts that are down."""
        ...

    async def bring_in(self, change: Callable[[State], State], what: str) -> Release:
        """One change, in its turn; `what` is for people. Raises MoEServeError; then nothing has changed."""
        ...


class Balancer:
    """Hears what callers ask of the experts. `rebalance` does one round; `keep` does one every balancing.interval_s, if that is enabled."""

    def __init__(self, planner: Planner, served: Balanced, frontends: Frontends, audit: AuditLog) -> None:
        self._planner, self._served, self._frontends, self._audit = planner, served, frontends, audit
        self._config = planner.balancing
        self._demand = Demand([spec.num_hosted_experts for spec in planner.layers.specs], self._config.window_s)
        #: layers that no round has looked at since
        self._turned = set[int]()
        self._slowdown = Slowdown(self._config.window_s)
        self._one_at_a_time = asyncio.Lock()

    async def keep(self) -> None:
        """Until cancelled."""
        next_at = time.monotonic() + self._config.interval_s
        told: tuple[Release, list[bool]] | None = None
        while True:
            await asyncio.sleep(min(timing.CONTROL_LOOK_S, self._config.interval_s))
            self._hear()
            is_due = time.monotonic() >= next_at or self._is_early()
            if is_due and self._config.enabled:
                await self._round_by_itself()
            # It is told when it is due, and at once for other places, or for layers that were not asked before.
            seen = self._served.state.release, [bool(rows.any()) for rows in self._demand.rows(time.monotonic())]
            if is_due or (seen != told and not self._one_at_a_time.locked()):
                told = seen
                await self._tell_balancedness()
            if is_due:
                next_at = time.monotonic() + self._config.interval_s

    async def rebalance(self, *, dry_run: bool) -> Rebalanced:
        """One round now, or only its plan.

        Raises ExpertUnavailable while a host is down, or when calls have become slower, or ConfigError when it cannot be made.
        """
        self._hear()
        demand = self._demand.rows(time.monotonic())
        if dry_run:
            planned = await self._planned(demand)
            return _told(planned, planned.release)
        return await self._round(demand, Begun("balance", "a round"))

    def load(self) -> LayerLoads:
        """What callers ask now, and what that makes of the hosts."""
        rows_per_s = self._demand.rows_per_s(time.monotonic())
        even = layer_balancedness(self._served.state.release.placement, rows_per_s, self._planner.placing.pipeline_stages)
        return LayerLoads(rows_per_s, even)

    async def _tell_balancedness(self) -> None:
        """To frontends, whose metrics, page and `moeserve top` show it; as nobody looks closer, they hear nothing of small changes."""
        even = tuple(math.nan if each is None else round(each, 2) for each in (await in_thread(self.load)).host_balancedness)
        if even != self._frontends.balancing.balancedness:
            self._frontends.set_balancing(balancedness=even)

    def _hear(self) -> None:
        reports, now = self._frontends.members(), time.monotonic()
        self._slowdown.hear({each.public_key: [np.array(each.call_times)] for each in reports if each.call_times}, now)
        try:
            self._demand.hear({each.public_key: read_counts(each.requested) for each in reports if each.requested}, now)
        except InvalidRequest as error:
            strangers.warning("the demand is not known: %s", error)

    async def _round_by_itself(self) -> None:
        try:
            await self._round(self._known(), Begun("balance", "a round", "balancing"))
        except Exception as error:  # any error, of Ray for example; it has been said and counted, and the next round tries again
            log.debug("the next round of balancing tries again after %r", error, exc_info=True)

    def _is_early(self) -> bool:
        """Whether callers have turned to other experts, and enough of what they ask now is known."""
        self._turned |= self._demand.turned(time.monotonic())
        known = {layer for layer, rows in enumerate(self._known()) if rows is not None}
        is_early = bool(self._turned & known)
        self._turned -= known
        return is_early

    def _known(self) -> Rows:
        """The rows of the layers that were asked often enough that the gain of a move is not a matter of chance."""
        fewest = len(self._served.state.assignments) * (_DEVIATIONS / max(self._config.min_gain, _LEAST_GAIN)) ** 2
        return [rows if rows.sum() >= fewest else None for rows in self._demand.rows(time.monotonic())]

    async def _round(self, demand: Rows, asked: Begun) -> Rebalanced:
        """Raises RoundStopped, or the error of planning or of a step; what has moved until then stays where it is."""
        async with self._one_at_a_time:
            planned: Round | None = None
            done = 0
            try:
                self._require_hosts()
                planned = await self._planned(demand)
                release = planned.release
                self._hear()
                with self._slowdown.round():
                    for placement in planned.steps:
                        self._require_hosts()
                        self._require_speed()
                        step = partial(stepped, served=release, copies=planned.copies, placement=placement)
                        release = await self._served.bring_in(step, f"{asked.kind}, step {done + 1} of {len(planned.steps)}")
                        done += 1
            except BaseException as error:  # a cancelled round, too
                self._end(asked, planned, done, error)
                raise
            self._end(asked, planned, done)
            return _told(planned, release)

    async def _planned(self, demand: Rows) -> Round:
        """Raises ConfigError when files cannot be read within placement.load_timeout_s, too."""
        planning = in_thread(planned_round, self._served.state, demand, self._planner)
        return await unless_stalled(planning, lambda: None, self._planner.placing.load_timeout_s, lambda: UNREADABLE)

    def _require_hosts(self) -> None:
        if down := self._served.down:
            raise RoundStopped(
                f"{', '.join(down[:_MAX_NAMES])} {'is' if len(down) == 1 else 'are'} down: nothing moves to balance the load"
            )

    def _require_speed(self) -> None:
        self._hear()
        if slower := self._slowdown.sentence(time.monotonic()):
            raise RoundStopped(f"{slower}: nothing more moves in this round")

    def _end(self, asked: Begun, planned: Round | None, done: int, error: BaseException | None = None) -> None:
        """Logs, tells and records how a round ended; one that found nothing to do is recorded if an administrator asked for it."""
        outcome: Outcome = "moved" if planned is not None and planned.steps else "unchanged"
        if error is not None:
            outcome = "stopped" if isinstance(error, RoundStopped) else "failed"
            log.warning("a round of balancing %s after %d steps: %s", outcome, done, error)
        else:
            log.info("a round of balancing: %s: %s", outcome, planned)
        self._say(outcome, planned, done)
        if outcome != "unchanged" or asked.why == ADMINISTRATOR:
            what = asked.what if planned is None else f"{done} of {number_of(len(planned.steps), 'step')} of a round; {planned.gain}"
            self._audit.end(replace(asked, what=what), None if planned is None else planned.cost_of(done), error)

    def _say(self, outcome: Outcome, planned: Round | None, done: int) -> None:
        """Tells frontends, whose metrics show it."""
        said = self._frontends.balancing
        moved_experts, moved_bytes = said.moved_experts, said.moved_bytes
        if planned is not None:
            cost = planned.cost_of(done)
            moved_experts, moved_bytes = moved_experts + cost.moves + cost.new, moved_bytes + cost.moved_bytes
        is_whole = planned is not None and done == len(planned.steps)
        self._frontends.set_balancing(
            rounds={**said.rounds, outcome: said.rounds.get(outcome, 0) + 1},
            latest=str(planned) if is_whole else f"round {outcome} after {number_of(done, 'step')}; moeserve events says why",
            moved_experts=moved_experts,
            moved_bytes=moved_bytes,
        )


def _told(planned: Round, release: Release) -> Rebalanced:
    cost = planned.cost
    return Rebalanced(
        epoch=release.epoch,
        moves=cost.moves,
        new=cost.new,
        kept=cost.kept,
        moved_bytes=cost.moved_bytes,
        steps=len(planned.steps),
        balancedness_before=mean_balancedness(planned.before),
        balancedness=mean_balancedness(planned.after),
    )
