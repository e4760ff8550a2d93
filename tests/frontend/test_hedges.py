"""Rows that are late are sent to a second copy too, within a budget."""

from __future__ import annotations

import asyncio
import select
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moeserve import Client, MoELayer
from moeserve.api.output import ForwardOutput
from moeserve.errors import Overloaded
from moeserve.frontend.delivery import Delivery
from moeserve.frontend.parcel import Way
from moeserve.frontend.routed import Part
from moeserve.layer.dispatch import HostWork
from moeserve.memory import Arena, Block
from moeserve.transport.shm_channel import ShmChannel
from tests.support.closeness import assert_close
from tests.support.harness import ServiceHarness
from tests.support.held import Held, Poisoned
from tests.support.waiting import until

LAYER: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 8, "num_experts": 4, "gating": {"top_k": 2}}
ROWS = torch.randn(8, 16, generator=torch.Generator().manual_seed(7))


def config(hedge: str) -> dict[str, Any]:
    return {"layers": [LAYER], "placement": {"num_hosts": 2, "copies": 2}, "resilience": {"hedge": hedge}}


def until_usual(service: ServiceHarness, forward: Callable[[], ForwardOutput]) -> None:
    """It is known how long hosts take, all are on time, and two batches may be sent twice: on a busy machine that is used up meanwhile."""
    hedges = service.frontend._forwards[0]._remedy._hedges
    for _ in range(100):
        forward()
    until(lambda: forward() is not None and hedges.spare_rows >= 2 * hedges._largest)
    until(lambda: not any(link.is_late for link in service.frontend._links.values()))


def as_expected(client: Client) -> Callable[[], ForwardOutput]:
    expected = MoELayer(**LAYER)(ROWS)

    def forward() -> ForwardOutput:
        assert_close((answer := client.forward(ROWS)).hidden_states, expected)
        return answer

    return forward


def test_a_late_host_is_not_waited_for(tmp_path: Path) -> None:
    with ServiceHarness(config("auto"), "local", tmp_path) as service, Client(service.target) as client:
        expected = MoELayer(**LAYER)(ROWS)
        until_usual(service, as_expected(client))
        held = Held(service.hosts[0])
        assert_close(client.forward(ROWS).hidden_states, expected)
        assert held.begun.acquire(timeout=30), "it was asked, too"
        sample = service.metrics.registry.get_sample_value
        assert (sample("moeserve_hedges_total", {"outcome": "won"}) or 0) >= 1
        for _ in range(10):
            assert_close(client.forward(ROWS).hidden_states, expected)
        assert len(held.rows) == 1, "it is asked nothing more before it answers"
        held.let_go()
        until(lambda: client.forward(ROWS) is not None and len(held.rows) > 1)


@pytest.mark.parametrize("pattern", ["ring", "hierarchical"])
def test_a_late_host_behind_others_is_not_waited_for(pattern: str, tmp_path: Path) -> None:
    settings = {**config("auto"), "placement": {"num_hosts": 4, "copies": 2}, "communication": {"pattern": pattern}}
    with ServiceHarness(settings, "local", tmp_path) as service, Client(service.target) as client:
        expected = MoELayer(**LAYER)(ROWS)
        until_usual(service, as_expected(client))
        held = Held(service.hosts[1])
        until(lambda: client.forward(ROWS) is not None and len(held.rows) > 0)
        assert_close(client.forward(ROWS).hidden_states, expected)
        held.let_go()


def test_a_second_copy_answers_in_two_parts_and_one_is_not_finite(tmp_path: Path) -> None:
    """That part is asked for again, and the other counts once."""
    settings = {**config("auto"), "placement": {"num_hosts": 4, "copies": 2}, "layers": [LAYER | {"num_experts": 8}]}
    with ServiceHarness(settings, "local", tmp_path) as service, Client(service.target) as client, ThreadPoolExecutor() as pool:
        places = service.placement.layers[0]
        hosts_of = [{int(host) for host in places.host_of_physical[places.logical_of_physical == expert]} for expert in range(8)]
        one, other = next(
            (a, b) for a in range(8) for b in range(8) if 0 in hosts_of[a] & hosts_of[b] and len(hosts_of[a] | hosts_of[b]) == 3
        )
        ids, weights = torch.tensor([[one, other]] * 8), torch.full((8, 2), 0.5)
        links = service.frontend._links

        async def owe(number: int) -> None:
            links[number].count_until(asyncio.get_running_loop().create_future(), 2**20)

        for number in (1, 2, 3):
            service.call(owe(number))
        expected = MoELayer(**settings["layers"][0]).run(ROWS, topk_ids=ids, topk_weights=weights).hidden_states
        until_usual(service, lambda: client.forward(ROWS, topk_ids=ids, topk_weights=weights))
        late, poison = Held(service.hosts[0]), Poisoned(service.hosts[next(iter(hosts_of[one] - {0}))])
        poison.let_go()
        answer = pool.submit(client.forward, ROWS, topk_ids=ids, topk_weights=weights)
        for held in (late, poison):
            assert held.begun.acquire(timeout=30)
        until(lambda: service.metrics.registry.get_sample_value("moeserve_expert_retries_total", {"reason": "non_finite"}))
        late.let_go()
        assert_close(answer.result(30).hidden_states, expected)


def test_the_second_copy_goes_as_it_is_about_to_be_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two hosts are late, on a busy machine not always at the same moment."""
    for attempt in range(8):
        (folder := tmp_path / str(attempt)).mkdir()
        if second_copy_goes(folder, monkeypatch):
            return
    raise AssertionError("they were never late together")


def second_copy_goes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> bool:
    """While the rows of the first are sent elsewhere, the copy of the other is lost, and then that one itself; False if none is asked."""
    layer = LAYER | {"num_experts": 2}
    settings = config("auto") | {"layers": [layer], "placement": {"num_hosts": 4, "copies": 2}}
    with ServiceHarness(settings, "local", folder) as service, Client(service.target) as client, ThreadPoolExecutor() as pool:
        expected = MoELayer(**layer)(ROWS)
        until_usual(service, lambda: client.forward(ROWS))
        exchange, links = service.frontend._forwards[0].exchange, service.frontend._links
        places, second_way, asked = service.placement.layers[0], exchange.second_way, []

        async def watched(delivery: Delivery, part: Part, works: Sequence[HostWork]) -> Way | None:
            asked.append(works)
            if len(asked) == 1:
                mine = {int(places.logical_of_physical[places.host_of_physical == work.host][0]) for work in works}
                for host in places.host_of_physical[~np.isin(places.logical_of_physical, list(mine))].tolist():
                    if not links[host].queue_tokens:
                        hang_up(host)
            way = await second_way(delivery, part, works)
            if len(asked) == 2:
                for parcel in delivery.owed:
                    asyncio.get_running_loop().call_soon(hang_up, parcel.host)
            return way

        def hang_up(host: int) -> None:
            channel = links[host].channel
            assert channel is not None
            channel.fall_silent(1.0)

        monkeypatch.setattr(exchange, "second_way", watched)
        held = [Held(host) for host in service.hosts]
        answer = pool.submit(client.forward, ROWS, timeout=20)
        until(lambda: asked)
        service.call(asyncio.sleep(0))  # both are asked in one turn
        are_two = len(asked) == 2
        for one in held:
            one.let_go()
        if are_two:
            assert_close(answer.result(30).hidden_states, expected)
    return are_two


def test_a_second_copy_without_room_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ServiceHarness(config("auto"), "local", tmp_path) as service, Client(service.target, retry=False) as client:
        until_usual(service, as_expected(client))
        exchange, channel = service.frontend._forwards[0].exchange, service.frontend._links[1].channel
        second_way, asked = exchange.second_way, []
        assert channel is not None

        async def without_room(delivery: Delivery, part: Part, works: Sequence[HostWork]) -> Way | None:
            asked.append(works)
            blocks = all_of(channel._arena) if len(asked) == 1 else []
            try:
                return await second_way(delivery, part, works)
            finally:
                blocks.clear()

        monkeypatch.setattr(exchange, "second_way", without_room)
        held = Held(service.hosts[0])
        assert_close(client.forward(ROWS, timeout=20).hidden_states, MoELayer(**LAYER)(ROWS))
        assert len(asked) >= 2
        held.let_go()


def all_of(arena: Arena) -> list[Block]:
    blocks, nbytes = [], 2**30
    while nbytes >= 2**12:
        try:
            blocks.append(arena.lend(nbytes))
        except Overloaded:
            nbytes //= 2
    return blocks


@pytest.mark.parametrize("fails", [0, 1])
@pytest.mark.parametrize("error", [Overloaded("replies under way fill the pool"), ValueError("a kernel failed")], ids=["full", "errs"])
def test_the_copy_that_answers_is_waited_for_and_the_one_that_errs_is_blamed(error: Exception, fails: int, tmp_path: Path) -> None:
    """The first or the second of two that were asked fails while the other is still at it; one that is full does not err."""
    ids, weights = torch.tensor([[0]]), torch.ones(1, 1)
    with ServiceHarness(config("auto"), "local", tmp_path) as service, Client(service.target, retry=False) as client:
        links, owed = service.frontend._links, (0, 2**20)

        async def owe() -> None:
            links[1].count_until(asyncio.get_running_loop().create_future(), owed[1])

        service.call(owe())  # so the first is asked first, and it is known how long that takes
        for _ in range(40):
            client.forward(ROWS[:1], topk_ids=ids, topk_weights=weights)
        until_usual(service, as_expected(client))
        held = [Held(host) for host in service.hosts]
        failed, other = held[fails], held[1 - fails]
        failed.error = type(error)(*error.args)  # one that is raised keeps what it was raised among
        with ThreadPoolExecutor() as pool:
            answer = pool.submit(client.forward, ROWS[:1], topk_ids=ids, topk_weights=weights, timeout=20)
            until(lambda: all(one.rows for one in held))
            failed.let_go()
            until(lambda: links[fails].queue_tokens == owed[fails])
            other.let_go()
            again = MoELayer(**LAYER).run(ROWS[:1], topk_ids=ids, topk_weights=weights)
            assert_close(answer.result(30).hidden_states, again.hidden_states)
        if isinstance(error, ValueError):
            until(lambda: links[fails]._erred_in)
        assert [bool(links[number]._erred_in) for number in (fails, 1 - fails)] == [isinstance(error, ValueError), False]


def test_a_copy_that_has_more_to_do_and_is_on_time_is_asked(tmp_path: Path) -> None:
    """A host that stands still owes little, because it is sent nothing more, while the others do its work, too."""
    with ServiceHarness(config("auto"), "local", tmp_path) as service, Client(service.target) as client:
        expected = MoELayer(**LAYER)(ROWS)
        until_usual(service, as_expected(client))
        held = Held(service.hosts[0])

        async def owe() -> None:
            service.frontend._links[1].count_until(asyncio.get_running_loop().create_future(), 2**20)

        service.call(owe())
        assert_close(client.forward(ROWS, timeout=8).hidden_states, expected)
        assert held.begun.acquire(timeout=30), "it had less to do, so it was asked first"
        held.let_go()


def test_a_host_whose_answer_comes_as_it_is_given_up_is_asked_again(tmp_path: Path) -> None:
    """Both copies' answers are read in one turn of the event loop: the second is of a message that the first has made needless."""
    with ServiceHarness(config("auto"), "local", tmp_path) as service, Client(service.target) as client, ThreadPoolExecutor() as pool:
        until_usual(service, as_expected(client))
        links = service.frontend._links

        async def owe() -> None:
            links[1].count_until(asyncio.get_running_loop().create_future(), 2**20)

        service.call(owe())
        late, quick = Held(service.hosts[0]), Held(service.hosts[1])
        answer = pool.submit(client.forward, ROWS)
        for held in (late, quick):
            assert held.begun.acquire(timeout=30)
        stands, at_leisure = threading.Event(), threading.Event()
        standing = pool.submit(service.call, stand(stands, at_leisure))
        assert stands.wait(30)
        for number, held in ((1, quick), (0, late)):
            held.leave.release()
            channel = links[number].channel
            assert isinstance(channel, ShmChannel)
            assert select.select([channel._packets], [], [], 30)[0], "it has answered"
        at_leisure.set()
        standing.result(30)
        assert_close(answer.result(30).hidden_states, MoELayer(**LAYER)(ROWS))
        until(lambda: not links[0].is_late)


async def stand(begun: threading.Event, until_set: threading.Event) -> None:
    """From when `begun` is set the event loop does nothing else."""
    begun.set()
    assert until_set.wait(30)


def test_no_more_than_a_twentieth_is_sent_twice(tmp_path: Path) -> None:
    with ServiceHarness(config("auto"), "local", tmp_path) as service, Client(service.target) as client:
        for _ in range(300):
            client.forward(ROWS)
        sample = service.metrics.registry.get_sample_value
        hedged = sum(sample("moeserve_hedges_total", {"outcome": outcome}) or 0 for outcome in ("won", "lost"))
        sent = sample("moeserve_messages_total", {"pattern": "all_to_all"}) or 0
        assert hedged <= 0.05 * sent + 4
