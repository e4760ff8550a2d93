"""Hosts that are threads end, fail and leave at any moment: what their fleet makes of that."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import threading
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from moeserve import ExpertUnavailable, ServiceConfig, load_config
from moeserve.cluster import thread_fleet
from moeserve.cluster.thread_fleet import ThreadFleet
from moeserve.cluster.thread_host import ThreadHost
from moeserve.cluster.threads import ThreadCluster
from moeserve.config import ServedModel
from moeserve.control import Assignment
from moeserve.host import Holdings, Host, Where
from moeserve.loops import in_thread
from moeserve.placement import LayerPlacement, Placement
from moeserve.release import Release
from tests.support.planning import planner_of
from tests.support.waiting import until_async

LAYER = {"hidden_size": 16, "intermediate_size": 32, "num_experts": 8}
CONFIG = load_config({"layers": [LAYER], "placement": {"num_hosts": 2}})
ASSIGNMENTS = [Assignment(number, "this-process") for number in range(2)]


def release_of(config: ServiceConfig) -> Release:
    planner = planner_of(config)
    return Release.first(planner.plan(2), planner.layers.sources)


class TestHoldings(Holdings):
    """`before` is called, with what begins, before a method that a test disturbs."""

    __test__ = False
    before: Callable[[str], None] = staticmethod(lambda what: None)

    def retire(self, epoch: int) -> None:
        self.before("retire")
        super().retire(epoch)

    def withdraw(self, epoch: int) -> None:
        self.before("withdraw")
        super().withdraw(epoch)

    def _count(self, release: Release) -> None:
        super()._count(release)
        self.before("read")


Hold = Callable[[int, Where], TestHoldings]


def hold(number: int, where: Where) -> TestHoldings:
    return TestHoldings(CONFIG.only(ServedModel), number, where.device)


def where(number: int, incarnation: int) -> Where:
    return ThreadCluster(CONFIG.only(ServedModel), CONFIG.placement, CONFIG.ray).where(number, incarnation)


@asynccontextmanager
async def fleet_of(hold: Hold) -> AsyncIterator[ThreadFleet]:
    fleet = ThreadFleet(where, hold)
    try:
        yield fleet
    finally:
        await fleet.stop()


async def test_a_host_that_leaves_keeps_no_weights() -> None:
    async with fleet_of(hold) as fleet:
        await fleet.take(release_of(CONFIG), ASSIGNMENTS)
        left, stays = (weakref.ref(fleet.members[number].host.holdings) for number in (1, 0))

        def is_gone() -> bool:
            gc.collect()
            return left() is None

        await fleet.remove([1])
        await until_async(is_gone)  # the thread that has ended it may not be quite at its own end
        assert stays() is not None


async def test_a_host_whose_pass_does_not_end_is_left_to_itself(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """As of an expert that waits for something: neither the next change nor the end of the service waits for it."""
    monkeypatch.setattr(thread_fleet, "STOP_TIMEOUT_S", 0.1)
    goes_on = threading.Event()
    try:
        async with fleet_of(hold) as fleet:
            await fleet.take(release_of(CONFIG), ASSIGNMENTS)
            fleet.members[1].host.hold(goes_on)
            async with asyncio.timeout(30):
                await fleet.remove([1])
            assert fleet.present.keys() == {0}
            assert "host-1 has not finished its pass in 0.1 s: it is left to itself" in caplog.messages
    finally:
        goes_on.set()


async def test_a_host_that_leaves_while_it_loads_reads_no_further() -> None:
    """Its thread would be in compiled code at the end of the process, which aborts Python."""
    reading, goes_on = threading.Event(), threading.Event()
    made: list[TestHoldings] = []

    def slow(number: int, where: Where) -> TestHoldings:
        made.append(hold(number, where))
        made[-1].before = lambda what: (reading.set(), goes_on.wait(30)) if what == "read" else None  # type: ignore[assignment,method-assign]
        return made[-1]

    async with fleet_of(slow) as fleet:
        taking = asyncio.create_task(fleet.take(release_of(CONFIG), ASSIGNMENTS))
        await in_thread(reading.wait, 30)
        taking.cancel()
        await asyncio.wait([taking])
        working = [thread for thread in threading.enumerate() if thread.name == "moeserve-work"]
        await fleet.stop()
    goes_on.set()
    for thread in working:
        await asyncio.to_thread(thread.join, 30)
    assert [holdings.experts_read for holdings in made] == [2], "the one that was read, and the one that was begun"


@pytest.mark.parametrize("what", ["retire", "withdraw"])
async def test_a_host_that_is_killed_while_others_forget(what: str) -> None:
    forgetting, goes_on = threading.Event(), threading.Event()

    def slow(number: int, where: Where) -> TestHoldings:
        made = hold(number, where)
        if number == 0:
            made.before = lambda begun: (forgetting.set(), goes_on.wait(30)) if begun == what else None  # type: ignore[assignment,method-assign]
        return made

    async with fleet_of(slow) as fleet:
        await fleet.take(release_of(CONFIG), ASSIGNMENTS)
        work = fleet.retire(1) if what == "retire" else fleet.withdraw(2)
        telling = asyncio.create_task(work)
        await in_thread(forgetting.wait, 30)
        fleet.members[1].kill()
        goes_on.set()
        await telling
        assert fleet.present.keys() == {0}


@pytest.mark.parametrize("what", ["retire", "withdraw"])
@pytest.mark.parametrize("read", [1, 5], ids=["the release that is forgotten is read", "the other one is"])
async def test_a_host_that_starts_while_others_forget_has_what_they_have(what: str, read: int) -> None:
    loading, goes_on = threading.Event(), threading.Event()
    made: list[TestHoldings] = []

    def slow(number: int, where: Where) -> TestHoldings:
        made.append(hold(number, where))
        if len(made) == 3:  # host 1 for the second time; of each release it has four experts
            made[2].before = lambda begun: wait() if (begun, made[2].experts_read) == ("read", read) else None  # type: ignore[assignment,method-assign]
        return made[-1]

    def wait() -> None:
        loading.set()
        goes_on.wait(30)

    async with fleet_of(slow) as fleet:
        first = release_of(CONFIG)
        layers = [LayerPlacement.of(2, layer.unit_of_physical, 1 - layer.host_of_physical) for layer in first.placement.layers]
        second = replace(first, placement=Placement(2, 2, tuple(layers)))
        await fleet.take(first, ASSIGNMENTS)
        await fleet.take(second, ASSIGNMENTS)
        fleet.members[1].kill()
        starting = asyncio.create_task(in_thread(fleet.members[1].start))
        await in_thread(loading.wait, 30)
        await (fleet.retire(2) if what == "retire" else fleet.withdraw(2))
        goes_on.set()
        await starting
        kept = 2 if what == "retire" else 1
        assert [fleet.members[number].host.holdings.store.epochs for number in range(2)] == [[kept], [kept]]
        assert [info.experts_held for info in fleet.present.values()] == [4, 4]


async def test_any_error_of_a_start_is_said_and_is_no_reason_to_try_at_once() -> None:
    def full(number: int, where: Where) -> TestHoldings:
        raise RuntimeError("not enough memory")

    async with fleet_of(full) as fleet:
        with pytest.raises(ExpertUnavailable, match=r"^host-0 cannot load its experts: RuntimeError: not enough memory$"):
            await fleet.take(release_of(CONFIG), ASSIGNMENTS)
        assert fleet.failing == {0: "host-0 cannot load its experts: RuntimeError: not enough memory"}


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priorities of their own")
async def test_hosts_let_whoever_brings_them_work_go_first() -> None:
    """Unless the whole process lets everybody go first."""
    others, here = set(threading.enumerate()), os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    def priorities() -> list[int]:
        hosts = [thread.native_id for thread in {*threading.enumerate()} - others if thread.name.startswith("host-")]
        return [os.getpriority(os.PRIO_PROCESS, number) for number in hosts if number is not None]

    async with fleet_of(hold) as fleet:
        await fleet.take(release_of(CONFIG), ASSIGNMENTS)
        await until_async(lambda: len(found := priorities()) == 2 and min(found) >= min(19, here + 1))
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == here


def test_an_incarnation_that_fails_while_it_ends_does_not_take_the_next_one_with_it() -> None:
    crashes: list[Callable[[], None]] = []

    def make(on_crash: Callable[[], None]) -> Host:
        crashes.append(on_crash)
        holdings = hold(0, where(0, len(crashes)))
        holdings.begin([release_of(CONFIG)])
        return Host(holdings, where(0, len(crashes)), (), on_crash)

    member = ThreadHost(0, make, lambda: None)
    member.start()
    member.kill()
    member.start()
    crashes[0]()
    assert member.is_up
    member.stop()


def test_an_incarnation_that_fails_before_it_is_known_is_not_up() -> None:
    def make(on_crash: Callable[[], None]) -> Host:
        holdings = hold(0, where(0, 1))
        holdings.begin([release_of(CONFIG)])
        host = Host(holdings, where(0, 1), (), on_crash)
        host.stop()
        host.has_failed = True
        return host

    member = ThreadHost(0, make, lambda: None)
    with pytest.raises(ExpertUnavailable, match="host-0 has failed as it started"):
        member.start()
    assert not member.is_up and member.error is not None
