"""How many hosts a load gets: it follows lasting changes, never swings, and never takes silence for idleness."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeserve import ConfigError, load_config
from moeserve.cli.app import main
from moeserve.config import AutoscalingConfig
from moeserve.control.autoscale import Bounds, Sizing
from moeserve.control.busy import BusyShares
from moeserve.observe.stats import PassTime
from tests.support.planning import planner_of

UP_S, DOWN_S = 15.0, 300.0
CONFIG = AutoscalingConfig(enabled=True, scale_up_after_s=UP_S, scale_down_after_s=DOWN_S)
LAYER = {"hidden_size": 8, "intermediate_size": 4, "num_experts": 6}
WIDE = Bounds(1, 10_000)


class Fleet:
    """Hosts that share the work, which is given in hosts that are busy all the time, second by second."""

    def __init__(self, hosts: int, bounds: Bounds = WIDE, config: AutoscalingConfig = CONFIG) -> None:
        self.numbers, self.now = [hosts], 0.0
        self._sizing, self._bounds = Sizing(config), bounds

    def run(self, work: Iterable[float], silent: int = 0) -> Sequence[int]:
        """All numbers of hosts so far; `silent` hosts say nothing."""
        for each in work:
            hosts, self.now = self.numbers[-1], self.now + 1
            known = max(0, hosts - silent)
            shares = [*[min(1.0, each / hosts)] * known, *[None] * (hosts - known)]
            if (resize := self._sizing.decide(self.now, hosts, shares, self._bounds)) is not None:
                assert resize.hosts == hosts != resize.wanted
                self.numbers.append(resize.wanted)
        return self.numbers


def test_hosts_follow_steps_of_the_load_after_its_periods_and_at_most_double() -> None:
    fleet = Fleet(1)
    assert fleet.run([0.6] * 1000) == [1]
    began = fleet.now
    assert fleet.run([7.0] * int(UP_S)) == [1], "not yet"
    assert fleet.run([7.0] * 200) == [1, 2, 3, 5, 8, 10], "busy hosts say only that they are too few"
    assert fleet.now > began
    assert fleet.run([0.5] * int(DOWN_S)) == [1, 2, 3, 5, 8, 10], "not yet"
    assert fleet.run([0.5] * 2) == [1, 2, 3, 5, 8, 10, 1]
    assert Fleet(4, config=CONFIG.model_copy(update={"target_busy": 0.1})).run([4.0] * 17) == [4, 8], "one step at most doubles"


@pytest.mark.parametrize(("bounds", "numbers"), [(Bounds(2, 5), [3, 5, 2]), (Bounds(4, 4), [3, 4]), (Bounds(1, 3), [3, 1])])
def test_the_number_stays_within_limits(bounds: Bounds, numbers: list[int]) -> None:
    assert Fleet(3, bounds).run([*[100.0] * 100, *[0.0] * 400]) == numbers


def test_a_pause_or_a_burst_shorter_than_the_period_changes_nothing() -> None:
    assert Fleet(4).run(([4.0] * 14 + [2.0]) * 50) == [4]
    assert Fleet(4).run(([0.0] * 299 + [2.5]) * 10) == [4]


@settings(deadline=None)
@given(
    hosts=st.integers(1, 300),
    peak=st.floats(0, 400),
    swing=st.lists(st.tuples(st.floats(0.8, 1.0), st.integers(1, 400)), min_size=1, max_size=8),
    bounds=st.tuples(st.integers(1, 50), st.integers(0, 300)).map(lambda pair: Bounds(pair[0], sum(pair))),
)
def test_a_load_that_swings_by_a_fifth_never_flaps(hosts: int, peak: float, swing: list[tuple[float, int]], bounds: Bounds) -> None:
    """However slowly: the number may go up to what the load needs, or down, but never one after the other."""
    numbers = Fleet(hosts, bounds).run(peak * share for share, seconds in swing for _ in range(seconds))
    assert sorted(numbers) == numbers or sorted(numbers, reverse=True) == numbers
    for before, after in pairwise(numbers):
        assert after <= bounds.most and after <= 2 * before
        assert after >= bounds.least or after == 2 * before


@settings(deadline=None)
@given(work=st.lists(st.tuples(st.floats(0, 50), st.integers(1, 400)), max_size=6), hosts=st.integers(1, 40), silent=st.integers(1, 40))
def test_silent_hosts_do_not_count_as_idle(work: list[tuple[float, int]], hosts: int, silent: int) -> None:
    """Where more than a few say nothing, none leaves; where all say nothing, none comes either."""
    fleet = Fleet(hosts)
    for each, seconds in work:
        before = fleet.numbers[-1]
        after = fleet.run([each] * seconds, silent=silent)[-1]
        assert after >= before or after >= silent / CONFIG.target_busy
        assert after == before or before > silent


def test_hosts_that_are_missing_do_not_count_as_idle() -> None:
    sizing = Sizing(CONFIG)
    assert not any(sizing.decide(float(second), 8, [0.9] * 4, WIDE) for second in range(1000)), "four of eight have no node"


def test_what_is_done_by_hand_begins_a_new_period() -> None:
    sizing = Sizing(CONFIG)
    assert not any(sizing.decide(float(second), 1, [1.0], WIDE) for second in range(14))
    assert not any(sizing.decide(float(second), 2, [0.9, 0.9], WIDE) for second in range(14, 29))
    resize = sizing.decide(29.0, 2, [0.9, 0.9], WIDE)
    assert resize is not None
    assert str(resize) == "2 hosts were 90% busy, and 3 have been wanted for 15.0 s"


def test_the_share_of_a_host_is_that_of_its_own_clock_lately() -> None:
    shares = BusyShares(5.0)
    for second in range(20):
        busy = {0: PassTime(700.0, 700.0 + second, second / 4), 1: PassTime(0.5, 1.5 + min(second, 12), 0.0)}
        shares.hear(busy if second < 17 else {0: busy[0]}, 100.0 + second)
        if second == 0:
            assert shares.shares(100.0) == {}, "nothing to compare with"
        if second == 14:
            assert shares.shares(114.0) == {0: 0.25, 1: 0.0}
        if second in (18, 19):
            assert shares.shares(100.0 + second) == {0: 0.25}, "the other has left"
    assert shares.shares(124.5) == {}, "nothing new for so long"


def test_a_silent_host_and_a_new_incarnation_have_no_share() -> None:
    shares = BusyShares(5.0)
    for second in range(8):
        shares.hear({0: PassTime(0.0, min(second, 2), 0.0)}, second)
    assert shares.shares(8.0) == {}
    for second in range(8, 12):
        shares.hear({0: PassTime(7.5, second, 0.0 if second == 8 else second - 8.5)}, second)
        assert shares.shares(second).get(0) == (None if second == 8 else pytest.approx((second - 8.5) / (second - 8)))


@pytest.mark.parametrize(
    ("tables", "sentence"),
    [
        ({"autoscaling": {"min_hosts": 3, "max_hosts": 2}}, "autoscaling.min_hosts is 3; allowed: at most autoscaling.max_hosts = 2"),
        (
            {"autoscaling": {"enabled": True, "max_hosts": 4}, "placement": {"num_hosts": "all"}},
            r"placement.num_hosts is 'all', but autoscaling.enabled is true and decides the number; allowed: 1\.\.4, to begin",
        ),
        (
            {"autoscaling": {"enabled": True, "min_hosts": 2}},
            "placement.num_hosts is 1; allowed while autoscaling.enabled is true: 2 or more",
        ),
        (
            {"autoscaling": {"enabled": True, "max_hosts": 2}, "placement": {"num_hosts": 3}},
            r"placement.num_hosts is 3; allowed while autoscaling.enabled is true: 1\.\.2",
        ),
        ({"autoscaling": {"target_busy": 1.0}}, "autoscaling.target_busy: Input should be less than 1"),
        ({"autoscaling": {"scale_up_after_s": 0}}, "autoscaling.scale_up_after_s: Input should be greater than 0"),
    ],
)
def test_what_cannot_be_is_refused(tables: dict[str, dict[str, object]], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load_config({"layers": [LAYER], **tables})


def test_the_experts_limit_the_number_too() -> None:
    def bounds(autoscaling: dict[str, int], **placement: object) -> Bounds:
        config = {"layers": [LAYER], "placement": placement, "autoscaling": {"enabled": True, **autoscaling}}
        return planner_of(load_config(config)).bounds()

    expert_bytes = 3 * 8 * 4 * 4
    assert bounds({}) == Bounds(1, 6)
    assert bounds({"max_hosts": 4}, memory_per_host_bytes=2 * expert_bytes) == Bounds(3, 4)
    assert bounds({"min_hosts": 2}, num_hosts=2, copies=2) == Bounds(2, 12)
    assert bounds({"max_hosts": 4}, experts_per_host=2) == Bounds(3, 4)
    with pytest.raises(ConfigError, match="max_hosts 2, but the experts need at least 3 hosts, and at most 6 can hold one each"):
        bounds({"max_hosts": 2}, memory_per_host_bytes=2 * expert_bytes)


@pytest.mark.parametrize(("most", "code", "said"), [(2, 2, "the experts need at least 3 hosts"), (3, 0, "ok, 1 MoE layer on 3 hosts")])
def test_a_check_finds_bounds_that_leave_no_number(
    most: int, code: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "service.toml"
    file.write_text(f"""
        layers = {{ hidden_size = 8, intermediate_size = 4, num_experts = 6 }}
        placement = {{ experts_per_host = 2 }}
        autoscaling = {{ enabled = true, max_hosts = {most} }}
        """)
    assert main(["config", "check", str(file)]) == code
    assert said in "".join(capsys.readouterr())
