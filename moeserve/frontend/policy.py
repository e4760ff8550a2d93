"""What is done about pairs that are lost or late: pure, from what is owed and the health of hosts to actions. The clock is an argument.

Sources: partial answers with a minimum of choices and a patience from hivemind's `RemoteMixtureOfExperts` (`k_min`,
`timeout_after_k_min`); hedged requests from Dean and Barroso, The Tail at Scale (2013).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Final, Literal

from moeserve.config import ResilienceConfig
from moeserve.errors import MoEServeError, Overloaded
from moeserve.frontend.health import HostHealth

#: policies under which an answer may lack choices
PARTIAL: Final = frozenset({"renormalize", "residual"})

_SHORTEST_PAUSE_S: Final = 0.001


@dataclass(frozen=True)
class Owed:
    """Pairs that were sent to `host` together, and that nobody has answered.

    rows           how many rows the message has
    since          monotonic seconds: when they were sent last, or lost
    is_lost        nobody computes them any more
    has_copy       lost: another copy lives, of some of them; late: of all of them, on hosts that are not late
    is_hedged      they were sent to a second copy, too
    error          what the host answered instead of sums, or that it has no room for the rows, None = it was lost
    is_refused     it answered with sums that are not finite
    not_before     monotonic seconds, until when it is no use to ask the same host again
    is_optional    an answer without them has resilience.k_min choices of every token, for one request at least
    others_at      monotonic seconds, when the first of the other hosts answered, inf = none has
    is_passed_on   other hosts compute some of them, and answer through this one
    """

    host: int
    rows: int
    since: float
    is_lost: bool
    has_copy: bool
    is_hedged: bool = False
    error: MoEServeError | None = None
    is_refused: bool = False
    not_before: float = 0.0
    is_optional: bool = False
    others_at: float = inf
    is_passed_on: bool = False


@dataclass(frozen=True)
class Resend:
    """To other copies, as far as there are any, and to the same host otherwise."""


@dataclass(frozen=True)
class Hedge:
    """To other copies, too: who answers first counts."""


@dataclass(frozen=True)
class Split:
    """To each of their hosts by itself: then it shows who is late."""


@dataclass(frozen=True)
class Accept:
    """Take the sums that are not finite: nobody says otherwise."""


@dataclass(frozen=True)
class GiveUp:
    """Answer without these pairs the requests that can be."""

    reason: Literal["host_lost", "late"]


@dataclass(frozen=True)
class Fail:
    """Requests that need these pairs get the host's error, or hear that their experts `why`."""

    why: str
    error: MoEServeError | None = None


Action = Resend | Hedge | Split | Accept | GiveUp | Fail


@dataclass
class Decision:
    """actions: what to do now, by position among what is owed; wake_at: when to ask again unless something happens, inf = never."""

    actions: dict[int, Action] = field(default_factory=dict)
    wake_at: float = inf


def decide(owed: Sequence[Owed], hosts: Mapping[int, HostHealth], rules: ResilienceConfig, spare_rows: int, now: float) -> Decision:
    """What to do about each that is lost or late; `hosts` are those that owe something, `spare_rows` is how many rows may be sent twice."""
    decision = Decision()
    for index, one in enumerate(owed):
        host = hosts[one.host]
        found = _lost(one, host, rules, now) if one.is_lost else _late(one, host, rules, spare_rows, now)
        if isinstance(found, float):
            decision.wake_at = min(decision.wake_at, found)
            continue
        decision.actions[index] = found
        if isinstance(found, Hedge | Split):
            spare_rows -= one.rows
    return decision


def is_fault(error: MoEServeError | None) -> bool:
    """Whether a host errs, and does not just have too much to do."""
    return error is not None and not isinstance(error, Overloaded)


def late_at(host: HostHealth, rules: ResilienceConfig, now: float) -> float:
    """When `decide` should be asked first about what is sent now, monotonic seconds; inf = unless something happens never."""
    at = now + host.late_after_s if rules.hedge == "auto" else inf
    return min(at, now + rules.partial_after_ms / 1000) if rules.on_expert_failure in PARTIAL else at


def _lost(one: Owed, host: HostHealth, rules: ResilienceConfig, now: float) -> Action | float:
    """What to do, or when to ask again."""
    if one.has_copy:
        return Resend()
    if one.is_refused:
        return Accept()
    if one.is_passed_on:
        return Resend()  # to each of their hosts by itself: then it shows what is lost
    may_lack = rules.on_expert_failure in PARTIAL and one.is_optional
    if one.error is not None:
        return GiveUp("host_lost") if may_lack and is_fault(one.error) else Fail(f"are on {host.name}, which errs", one.error)
    if host.is_connected:
        return Resend() if now >= one.not_before else one.not_before
    return _gone(host, rules, may_lack, now)


def _gone(host: HostHealth, rules: ResilienceConfig, may_lack: bool, now: float) -> Action | float:
    """No copy lives."""
    if rules.on_expert_failure == "fail":
        return Fail(f"were lost with {host.name}")
    if may_lack:
        due = host.down_since + rules.partial_after_ms / 1000
        return GiveUp("host_lost") if host.why_not or now >= due else due
    return Fail(f"on {host.name} are not available: {host.why_not}") if host.why_not else inf


def _late(one: Owed, host: HostHealth, rules: ResilienceConfig, spare_rows: int, now: float) -> Action | float:
    """What to do, or when to ask again."""
    at = inf
    if rules.hedge == "auto" and not one.is_hedged:
        at = one.since + host.late_after_s
        if now >= at and one.rows <= spare_rows and (one.has_copy or one.is_passed_on):
            return Hedge() if one.has_copy else Split()
        at = at if now < at else now + max(host.late_after_s, _SHORTEST_PAUSE_S)
    if rules.on_expert_failure in PARTIAL and one.is_passed_on:
        due = one.since + rules.partial_after_ms / 1000
        return Split() if now >= due else min(at, due)
    if rules.on_expert_failure in PARTIAL and one.is_optional:
        due = max(one.since, one.others_at) + rules.partial_after_ms / 1000
        if now >= due:
            return Hedge() if one.has_copy and not one.is_hedged else GiveUp("late")
        at = min(at, due if due < inf else now + max(rules.partial_after_ms / 1000, _SHORTEST_PAUSE_S))
    return at
