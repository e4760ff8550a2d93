"""Who follows, who is counted, and whom hosts let in."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from moeserve.config import LayerSpec, load_config
from moeserve.control import timing
from moeserve.control.counted import Elsewhere
from moeserve.control.follow import Order, Report
from moeserve.control.frontends import Frontends
from moeserve.errors import ConfigError
from moeserve.observe.counted import COMPUTED, Counted, LayerCounted
from moeserve.observe.metrics import Metrics
from moeserve.placement import plan_placement
from moeserve.programs.more_frontends import metrics_targets
from moeserve.release import Release
from moeserve.transport import KeyPair
from tests.support.two_layers import CONFIG, spec
from tests.support.waiting import until_async

SERVES = Report("f", epoch=1, oldest_epoch=1)


class Case:
    """Frontends of one epoch, and everything that was said of keys."""

    def __init__(self, keys: frozenset[str] = frozenset()) -> None:
        self.config = load_config(CONFIG)
        self.keys: list[frozenset[str]] = []
        self.frontends = Frontends("the-service", self.config, self.config.server.drain_timeout_s, self.admit, keys)
        self.frontends.begin(self.release(1))

    async def admit(self, keys: frozenset[str]) -> None:
        self.keys.append(keys)

    def release(self, epoch: int) -> Release:
        return Release(plan_placement([spec()] * 2, self.config.placement, epoch))


async def next_of(orders: AsyncIterator[Order]) -> Order:
    async with asyncio.timeout(10):
        return await anext(orders)


async def test_each_gets_keys_of_its_own_and_keeps_them_when_it_comes_back() -> None:
    case = Case()
    one, two = await case.frontends.join(Report("one")), await case.frontends.join(Report("two"))
    assert one.keys and two.keys and one.keys != two.keys
    assert case.keys[-1] == {one.public_key, two.public_key}
    case.frontends.leave(one)
    three = await case.frontends.join(Report("three"))
    assert case.keys[-1] == {one.public_key, two.public_key, three.public_key}, "it may serve on, and come back"
    back = await case.frontends.join(Report("one", public_key=one.public_key))
    assert (back.keys, back.public_key) == (None, one.public_key)
    await case.frontends.left(back)
    assert case.keys[-1] == {two.public_key, three.public_key}


async def test_one_that_does_not_come_back_loses_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "KEEP_KEY_S", 0.0)
    case = Case()
    case.frontends.leave(await case.frontends.join(Report("one")))
    two = await case.frontends.join(Report("two"))
    assert case.keys[-1] == {two.public_key}


async def test_keys_of_an_earlier_controller_are_valid_and_their_owners_are_waited_for() -> None:
    key = KeyPair.generate().public
    case = Case(frozenset({key}))
    await case.frontends.join(Report("new"))
    assert key in case.keys[-1]
    waiting = asyncio.create_task(case.frontends.until_back(3600.0))
    await asyncio.sleep(0)
    assert not waiting.done()
    await case.frontends.join(Report("old", public_key=key))
    await waiting
    await Case(frozenset({key})).frontends.until_back(0.01)


async def test_a_second_stream_of_the_same_frontend_ends_the_first() -> None:
    case = Case()
    first = await case.frontends.join(Report("one"))
    orders = case.frontends.orders(first)
    assert (await next_of(orders)).setup is not None
    second = await case.frontends.join(Report("one", public_key=first.public_key))
    with pytest.raises(StopAsyncIteration):
        await next_of(orders)
    case.frontends.leave(first)
    assert [info.name for info in case.frontends.members()] == ["one"]
    assert first.public_key in case.keys[-1] and not second.is_dismissed


async def test_the_slow_are_told_the_latest_only() -> None:
    case = Case()
    one = await case.frontends.join(Report("one"))
    orders = case.frontends.orders(one)
    first = await next_of(orders)
    assert first.current is not None and first.current.epoch == 1 and first.candidate is None
    for epoch in (2, 3):
        case.frontends.publish(case.release(epoch))
    offering = asyncio.create_task(case.frontends.offer(case.release(4)))
    await asyncio.sleep(0)
    order = await next_of(orders)
    assert order.current is not None and order.candidate is not None
    assert (order.current.epoch, order.candidate.epoch, order.setup) == (3, 4, None)
    case.frontends.hear(one, replace(SERVES, tried_epoch=4))
    await offering
    case.frontends.withdraw()
    assert (await next_of(orders)).candidate is None


async def test_who_is_waited_for_when_a_release_is_tried() -> None:
    case = Case()
    serving, starting = await case.frontends.join(SERVES), await case.frontends.join(Report("starting"))
    trying = asyncio.create_task(case.frontends.offer(case.release(2)))
    await asyncio.sleep(0)
    late = await case.frontends.join(SERVES)
    for _ in range(3):
        await asyncio.sleep(0)
    assert not trying.done()
    case.frontends.hear(serving, replace(SERVES, tried_epoch=2))
    await asyncio.sleep(0.01)
    assert not trying.done(), "the late one serves, so it counts"
    case.frontends.leave(late)
    await trying
    assert starting.report.tried_epoch == 0
    case.frontends.hear(serving, replace(SERVES, tried_epoch=3, refusal="no gate"))
    with pytest.raises(ConfigError, match="frontend f cannot use epoch 3: no gate"):
        await case.frontends.offer(case.release(3))


async def test_a_release_is_tried_although_the_only_frontend_does_not_serve_yet() -> None:
    case = Case()
    starting = await case.frontends.join(Report("starting"))
    trying = asyncio.create_task(case.frontends.offer(case.release(2)))
    for report in (starting.report, SERVES):
        case.frontends.hear(starting, report)
        await asyncio.sleep(0.01)
        assert not trying.done()
    case.frontends.hear(starting, replace(SERVES, tried_epoch=2, refusal="it explodes"))
    with pytest.raises(ConfigError, match="cannot use epoch 2: it explodes"):
        await trying


async def test_who_is_waited_for_when_a_release_is_left() -> None:
    case = Case()
    serving, starting, fresh = [await case.frontends.join(report) for report in (SERVES, Report("starting"), Report("fresh"))]
    await next_of(case.frontends.orders(starting))  # it may be about to serve epoch 1
    case.frontends.publish(case.release(2))
    await next_of(case.frontends.orders(fresh))
    draining = asyncio.create_task(case.frontends.drained())
    for member, report in ((serving, replace(SERVES, epoch=2)), (serving, replace(SERVES, epoch=2, oldest_epoch=2))):
        case.frontends.hear(member, report)
        await asyncio.sleep(0.01)
        assert not draining.done()
    case.frontends.hear(starting, replace(SERVES, epoch=2, oldest_epoch=2))
    await asyncio.wait_for(draining, 10)
    assert fresh.report.epoch == 0, "it has never heard of epoch 1"


async def test_what_a_program_has_counted_is_forgotten_after_it_has_left() -> None:
    """A long-lived service has many of them."""
    layers = (LayerCounted(3, {COMPUTED: bytes(8 * spec().num_experts)}),)
    case = Case()
    elsewhere = Elsewhere(Metrics([spec()]), case.frontends.keys)
    first, second = await case.frontends.join(Report("first")), await case.frontends.join(Report("second"))
    counted = {member.public_key: Counted(layers=layers) for member in (first, second)}
    kept = {key: weakref.ref(value) for key, value in counted.items()}
    for key in list(counted):
        elsewhere.take(key, counted.pop(key))
    await case.frontends.left(first)
    case.frontends.leave(second)  # it may come back
    third = await case.frontends.join(Report("third"))
    elsewhere.take(third.public_key, Counted(layers=layers))
    assert [kept[member.public_key]() is None for member in (first, second)] == [True, False]


@pytest.mark.parametrize("layers", [(), (spec(), spec()), (replace(spec(), num_experts=4),)])
def test_a_frontend_with_other_layers_counts_for_nothing(layers: tuple[LayerSpec, ...], caplog: pytest.LogCaptureFixture) -> None:
    elsewhere, theirs = Elsewhere(metrics := Metrics([spec()]), frozenset), Metrics(layers)
    theirs.observe_call("Forward", "OK", 0.1)
    for _ in range(2):
        elsewhere.take("key", theirs.counted())
    assert "other layers" in caplog.text
    assert not metrics.calls() and metrics.experts.tokens == [0]


class SlowHosts:
    """They have heard of keys when `go_on` is set."""

    def __init__(self) -> None:
        self.told: list[frozenset[str]] = []
        self.go_on = asyncio.Event()

    async def hear(self, keys: frozenset[str]) -> None:
        self.told.append(keys)
        await self.go_on.wait()


async def test_many_that_come_at_once_are_let_in_together() -> None:
    """Where a host hangs, telling the hosts of one more takes seconds."""
    hosts = SlowHosts()
    case = Case()
    frontends = Frontends("the-service", case.config, 1.0, hosts.hear)
    joining = [asyncio.create_task(frontends.join(Report(f"f-{number}"))) for number in range(8)]
    await until_async(lambda: len(frontends.members()) == 8)
    assert len(hosts.told) == 1 and not any(one.done() for one in joining)
    hosts.go_on.set()
    keys = {member.public_key for member in await asyncio.gather(*joining)}
    assert hosts.told[1:] == [keys]


async def test_who_gives_up_while_hosts_are_told_leaves_nothing_half_told() -> None:
    hosts = SlowHosts()
    frontends = Frontends("the-service", Case().config, 1.0, hosts.hear)
    hosts.go_on.set()
    stays = await frontends.join(Report("stays"))
    hosts.go_on.clear()
    one = asyncio.create_task(frontends.join(Report("one", public_key=KeyPair.generate().public)))
    await until_async(lambda: len(hosts.told) == 2)
    one.cancel()
    await asyncio.wait({one})
    hosts.go_on.set()
    back = await frontends.join(Report("one", public_key=next(iter(hosts.told[1] - {stays.public_key}))))
    await frontends.left(back)
    assert hosts.told[2:] == [hosts.told[1], {stays.public_key}]


async def test_only_the_processes_of_a_service_count_on_its_page() -> None:
    """A frontend elsewhere has a page of its own, whatever it is called: it would count twice, or be looked for on this machine."""
    case = Case()
    for name in ("serve", "serve-1", "serve-3", "serve-eu"):
        await case.frontends.join(Report(name, metrics_target="127.0.0.1:9464"))
    assert metrics_targets(case.frontends, 3) == {"serve-1": "127.0.0.1:9464"}
