"""The audit log of a controller, without hosts that compute: what the nodes do to it, and how large it becomes."""

from __future__ import annotations

import asyncio

import pytest

from moeserve import ConfigError, load_config
from moeserve.control.audit import AuditLog, Begun, ChangeWithdrawn
from moeserve.control.controller import Controller
from moeserve.control.first_state import first_state
from moeserve.control.frontends import Frontends
from moeserve.control.rounds import RoundStopped
from moeserve.observe.audit import AuditEvent
from moeserve.placement import Transition
from tests.support.planning import planner_of
from tests.support.simulated import SimulatedHosts, SimulatedNodes

LAYER = {"hidden_size": 8, "intermediate_size": 4, "num_experts": 6}


async def recorded(log: AuditLog) -> list[AuditEvent]:
    return [event async for event in log.events()]


async def controller_on(nodes: SimulatedNodes, hosts: SimulatedHosts, **placement: object) -> Controller:
    async def admit(keys: frozenset[str]) -> None:
        pass

    config = load_config({"layers": [LAYER], "placement": placement})
    planner = planner_of(config)
    state, frontends = await first_state(planner, nodes), Frontends("id", config, 1.0, admit)
    frontends.begin(state.release)
    controller = Controller(planner, state, nodes, hosts, frontends, lambda _: None)
    await controller.begin(hosts.take(state.release, state.assignments), "the service starts")
    return controller


async def test_what_nodes_and_lost_hosts_did() -> None:
    nodes, hosts = SimulatedNodes({"a": 2, "b": 1}), SimulatedHosts()
    controller = await controller_on(nodes, hosts, num_hosts="all")
    nodes.cpus["c"] = 1
    await controller.follow()
    nodes.leaving.add("b")
    await controller.follow()
    del nodes.cpus["c"]
    nodes.cpus["d"] = 1
    await controller.follow()
    hosts.given_up = {0}
    await controller.follow()
    await controller.follow()
    hosts.refuses = True
    nodes.cpus["e"] = 1
    for _ in range(2):
        hosts.refuses = True
        with pytest.raises(ConfigError, match="the disk is full"):
            await controller.follow()
    assert [(event.kind, event.what, event.why, event.outcome, event.epoch, event.moves) for event in await recorded(controller.audit)] == [
        ("start", "3 hosts", "the service starts", "done", 1, 0),
        ("hosts", "in: host-3 on c", "nodes have room for more hosts", "done", 2, 1),
        ("hosts", "out: host-1 on b", "node b is leaving", "done", 3, 2),
        ("hosts", "out: host-3 on c; in: host-4 on d", "node c is gone", "done", 4, 2),
        ("hosts", "out: host-0 on a; in: host-5 on a", "host-0 was given up", "done", 5, 2),
        ("hosts", "in: host-6 on e", "nodes have room for more hosts", "failed", 5, 0),
    ]


async def test_what_cannot_be_replaced_is_said_once() -> None:
    nodes, hosts = SimulatedNodes({"a": 1, "b": 1}), SimulatedHosts()
    controller = await controller_on(nodes, hosts, num_hosts=2, memory_per_host_bytes=3 * 3 * 8 * 4 * 4)
    for _ in range(2):
        del nodes.cpus["b"]
        for _ in range(3):
            await controller.follow()
        nodes.cpus["b"] = 1
        for _ in range(3):
            await controller.follow()
    _, *events = await recorded(controller.audit)
    assert [(event.what, event.why, event.outcome) for event in events] == 2 * [
        ("2 wanted, 2 assigned", "node b is gone", "failed"),
        ("2 wanted, 2 assigned", "all wanted hosts fit again", "done"),
    ]
    assert "placement.num_hosts is 2" in events[0].error and events[0].error == events[2].error


async def test_a_change_that_is_withdrawn() -> None:
    nodes, hosts = SimulatedNodes({"a": 4}), SimulatedHosts()
    controller = await controller_on(nodes, hosts, num_hosts=2)
    begun = asyncio.Event()

    async def take(*_: object) -> None:
        begun.set()
        await asyncio.Event().wait()

    hosts.take = take  # type: ignore[method-assign,assignment]
    scaling = asyncio.create_task(controller.scale(3))
    await begun.wait()
    assert controller.status().changing == "scale"
    await controller.abandon()
    with pytest.raises(ChangeWithdrawn):
        await scaling
    assert controller.status().changing == ""
    _, withdrawn = await recorded(controller.audit)
    assert (withdrawn.kind, withdrawn.outcome, withdrawn.error, withdrawn.epoch) == ("scale", "withdrawn", "the service was ending", 1)


async def test_a_reader_that_does_not_read_costs_nothing_and_the_log_is_bounded() -> None:
    log, over = AuditLog(lambda: 1), asyncio.Event()
    log.end(Begun("scale", "first"))
    slow = log.events(over)
    assert (await anext(slow)).what == "first"
    for number in range(2500):
        log.end(Begun("scale", f"number {number}" + 10_000 * "x"))
    over.set()
    read = [event async for event in slow]
    assert [event.number for event in read] == list(range(1502, 2502)), "the latest; gaps are seen in their numbers"
    assert max(len(event.what) for event in read) == 500


async def test_the_latest_events_are_for_the_next_controller() -> None:
    saved: list[tuple[AuditEvent, ...]] = []
    log = AuditLog(lambda: 1)
    log.go_on((), saved.append)
    for number in range(300):
        log.end(Begun("scale", f"number {number}"))
    log.end(Begun("hosts", "out: host-1", "node n is gone"), error=ConfigError("no room"))
    successor = AuditLog(lambda: 1)
    successor.go_on(saved[-1], saved.append)
    successor.end(Begun("hosts", "out: host-1", "node n is gone"), error=ConfigError("no room"))
    successor.end(Begun("scale", "the first of the successor"))
    *known, new = await recorded(successor)
    assert tuple(known) == saved[-2] and len(known) == 200, "what is still so is not told twice"
    assert [event.number for event in saved[-1]] == list(range(103, 303)) and saved[-1][-1] == new


async def test_what_cannot_be_saved_is_in_force_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    def save(_: object) -> None:
        raise OSError("the cluster is gone")

    log = AuditLog(lambda: 1)
    log.go_on((), save)
    log.end(Begun("scale", "to 3 hosts"))
    assert [event.what for event in await recorded(log)] == ["to 3 hosts"]
    assert "the audit log could not be saved" in caplog.text


async def test_a_round_that_has_moved_something_is_an_event_however_it_ended() -> None:
    log = AuditLog(lambda: 1)
    for moves in (1, 2, 0):
        log.end(Begun("balance", f"{moves} moved", "balancing"), Transition(moves, 0, 4, 512, {}), RoundStopped("host-2 is down"))
    assert [(event.what, event.outcome) for event in await recorded(log)] == [("1 moved", "stopped"), ("2 moved", "stopped")]


async def test_what_fails_by_itself_again_and_again_is_one_event() -> None:
    log = AuditLog(lambda: 1)
    for error in (ConfigError("no room"), ConfigError("no room"), None, ConfigError("no room"), ConfigError("no memory")):
        log.end(Begun("hosts", "out: host-1", "node n is gone"), error=error)
        log.end(Begun("scale", "to 3 hosts"), error=error)
    seen = [event async for event in log.events()]
    assert [event.error for event in seen if event.kind == "hosts"] == ["no room", "", "no room", "no memory"]
    assert len([event for event in seen if event.kind == "scale"]) == 5


async def test_a_step_of_autoscaling_that_fails_again_and_again_is_one_event() -> None:
    log = AuditLog(lambda: 1)
    for busy, why in ((91, "the disk is full"), (93, "the disk is full"), (94, "the disk is broken")):
        asked = Begun("scale", "to 3 hosts", f"autoscaling: 2 hosts were {busy}% busy, and 3 have been wanted for 15.2 s")
        log.end(asked, error=ConfigError(why))
    log.end(Begun("scale", "to 3 hosts"), error=ConfigError("the disk is broken"))
    assert [(event.why.partition(":")[0], event.error) for event in await recorded(log)] == [
        ("autoscaling", "the disk is full"),
        ("autoscaling", "the disk is broken"),
        ("administrator", "the disk is broken"),
    ]
