"""What is done about pairs that are lost or late, whatever is owed and however the hosts do."""

from __future__ import annotations

from math import inf
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeserve.config import ResilienceConfig
from moeserve.errors import MoEServeError, Overloaded
from moeserve.frontend.health import HostHealth
from moeserve.frontend.policy import PARTIAL, Accept, Decision, Fail, GiveUp, Hedge, Owed, Resend, Split, decide, late_at

NOW = 100.0
seconds = st.floats(0, 200, allow_nan=False)


def host(**said: Any) -> HostHealth:
    usual = {"is_connected": True, "queue_tokens": 1, "down_since": 0.0, "why_not": "", "late_after_s": 0.01}
    return HostHealth(**{"name": "host-0", **usual, **said})


def rules(**said: Any) -> ResilienceConfig:
    return ResilienceConfig(**said)


def only(decision: Decision) -> object:
    return decision.actions.get(0)


hosts = st.builds(
    host,
    is_connected=st.booleans(),
    down_since=seconds,
    why_not=st.sampled_from(["", "its node is gone"]),
    late_after_s=st.floats(0.001, 10) | st.just(inf),
)
parcels = st.builds(
    Owed,
    host=st.just(0),
    rows=st.integers(1, 100),
    since=seconds,
    is_lost=st.booleans(),
    has_copy=st.booleans(),
    is_hedged=st.booleans(),
    error=st.none() | st.just(MoEServeError("it failed")),
    is_refused=st.booleans(),
    not_before=seconds,
    is_optional=st.booleans(),
    others_at=seconds | st.just(inf),
    is_passed_on=st.booleans(),
)
policies = st.builds(
    rules,
    on_expert_failure=st.sampled_from(["retry", "renormalize", "residual", "fail"]),
    hedge=st.sampled_from(["off", "auto"]),
    partial_after_ms=st.floats(0, 1000),
)


@given(parcels, hosts, policies, st.integers(0, 50))
def test_whatever_happens(one: Owed, its: HostHealth, how: ResilienceConfig, spare: int) -> None:
    decision = decide([one], {0: its}, how, spare, NOW)
    action = only(decision)
    assert decision.wake_at > NOW, "asking again at once would not end"
    if one.is_lost:
        assert not isinstance(action, Hedge)
        if one.has_copy:
            assert action == Resend(), "another copy lives: there at once"
    else:
        assert not isinstance(action, (Resend, Accept, Fail)), "what is under way is not sent again, and fails nobody"
    if isinstance(action, GiveUp):
        assert how.on_expert_failure in PARTIAL and one.is_optional
    if isinstance(action, Hedge) and how.on_expert_failure not in PARTIAL:
        assert how.hedge == "auto" and one.rows <= spare and one.has_copy and not one.is_hedged
    if how.on_expert_failure == "fail" and one.is_lost and not its.is_connected:
        assert action is not None, "at once"


@given(parcels, hosts, policies, st.integers(0, 50))
def test_it_comes_to_the_same_when_asked_again_at_the_time_it_says(one: Owed, its: HostHealth, how: ResilienceConfig, spare: int) -> None:
    """Somebody who sleeps until `wake_at` misses nothing: asked in between, nothing is to be done."""
    decision = decide([one], {0: its}, how, spare, NOW)
    if only(decision) is None and decision.wake_at < inf:
        between = decide([one], {0: its}, how, spare, (NOW + decision.wake_at) / 2)
        assert only(between) is None or one.has_copy, "hedges depend on what others have to do, too"


@given(st.lists(parcels, max_size=6), hosts, st.integers(0, 50))
def test_no_more_rows_are_hedged_than_may_be(owed: list[Owed], its: HostHealth, spare: int) -> None:
    decision = decide(owed, {0: its}, rules(hedge="auto"), spare, NOW)
    assert sum(owed[index].rows for index, action in decision.actions.items() if isinstance(action, Hedge)) <= spare


def lost(**said: Any) -> Owed:
    return Owed(**{"host": 0, "rows": 4, "since": NOW - 1, "is_lost": True, "has_copy": False, "is_optional": True, **said})


DOWN = host(is_connected=False, down_since=NOW - 0.2)


def test_a_lost_host_without_copies() -> None:
    def asked(policy: str, its: HostHealth = DOWN, **said: Any) -> Decision:
        return decide([lost(**said)], {0: its}, rules(on_expert_failure=policy, partial_after_ms=500), 0, NOW)

    assert asked("retry") == Decision({}, inf)
    assert only(asked("fail")) == Fail("were lost with host-0")
    assert only(asked("retry", is_passed_on=True)) == Resend(), "those behind it live"
    for policy in PARTIAL:
        assert asked(policy) == Decision({}, pytest.approx(NOW + 0.3))
        assert only(asked(policy, host(is_connected=False, down_since=NOW - 0.6))) == GiveUp("host_lost")
        assert only(asked(policy, host(is_connected=False, down_since=NOW, why_not="it fails"))) == GiveUp("host_lost")
        assert asked(policy, is_optional=False) == Decision({}, inf)
    assert only(asked("retry", host(is_connected=False, why_not="it fails"))) == Fail("on host-0 are not available: it fails")
    assert only(asked("retry", host())) == Resend()
    assert asked("retry", host(), not_before=NOW + 0.1) == Decision({}, NOW + 0.1)


def test_a_host_that_errs_without_copies() -> None:
    error = MoEServeError("the kernel failed")
    for policy in ("retry", "fail"):
        action = only(decide([lost(error=error)], {0: host()}, rules(on_expert_failure=policy), 0, NOW))
        assert isinstance(action, Fail) and action.error is error
    assert only(decide([lost(error=error)], {0: host()}, rules(on_expert_failure="renormalize"), 0, NOW)) == GiveUp("host_lost")
    full = Overloaded("no room")
    action = only(decide([lost(error=full)], {0: host()}, rules(on_expert_failure="renormalize"), 0, NOW))
    assert isinstance(action, Fail) and action.error is full, "the host is not lost: its caller comes again"
    assert only(decide([lost(is_refused=True)], {0: host()}, rules(on_expert_failure="renormalize"), 0, NOW)) == Accept()


def late(**said: Any) -> Owed:
    return Owed(**{"host": 0, "rows": 4, "since": NOW - 0.02, "is_lost": False, "has_copy": True, **said})


def test_a_late_host() -> None:
    def asked(one: Owed, spare: int = 4, **how: Any) -> Decision:
        return decide([one], {0: host()}, rules(**how), spare, NOW)

    assert asked(late()) == Decision({}, inf)
    assert only(asked(late(), hedge="auto")) == Hedge()
    for not_now in (
        asked(late(), 3, hedge="auto"),
        asked(late(has_copy=False), hedge="auto"),
        asked(late(since=NOW - 0.005), hedge="auto"),
    ):
        assert not_now.actions == {} and NOW < not_now.wake_at <= NOW + 0.011
    assert asked(late(is_hedged=True), hedge="auto") == Decision({}, inf)

    passed_on = {"is_passed_on": True, "has_copy": False}
    assert only(asked(late(**passed_on), hedge="auto")) == Split(), "to copies of the late one alone, when it shows"
    assert asked(late(**passed_on), hedge="off").actions == {}

    partial = {"on_expert_failure": "renormalize", "partial_after_ms": 10}
    others = {"is_optional": True, "others_at": NOW - 0.015}
    assert only(asked(late(**others), **partial)) == Hedge(), "a copy that lives is better than an answer without"
    assert only(asked(late(has_copy=False, **others), **partial)) == GiveUp("late")
    assert only(asked(late(is_hedged=True, **others), **partial)) == GiveUp("late")
    assert asked(late(has_copy=False, **{**others, "others_at": inf}), **partial).actions == {}, "one long pass is not late by itself"
    assert only(asked(late(**passed_on), **partial)) == Split(), "nobody knows who is late"


def test_when_to_look_first() -> None:
    assert late_at(host(), rules(), NOW) == inf
    assert late_at(host(), rules(hedge="auto"), NOW) == NOW + 0.01
    assert late_at(host(), rules(on_expert_failure="residual", partial_after_ms=5), NOW) == NOW + 0.005
