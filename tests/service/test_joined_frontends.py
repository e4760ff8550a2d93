"""Hosts join what frontends send that do not know of each other."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from moeserve import Client, MoELayer
from tests.support.closeness import assert_close
from tests.support.followers import ThreadedFrontend
from tests.support.harness import ServiceHarness
from tests.support.held import Held
from tests.support.two_layers import CONFIG, LAYERS, tokens
from tests.support.waiting import until

HERE = "this-node"


def test_hosts_join_the_work_of_all_frontends(tmp_path: Path) -> None:
    with ServiceHarness({**CONFIG, "placement": {"num_hosts": 1}}, "shm", tmp_path) as service, ExitStack() as stack:
        service.call(service.open_control())
        clients = [
            stack.enter_context(Client(stack.enter_context(ThreadedFrontend(service.control_target, node)).target)) for node in (HERE, "")
        ]
        pool, held = stack.enter_context(ThreadPoolExecutor()), Held(service.hosts[0])
        # What has been sent over TCP may reach the host when the next pass has begun: seldom.
        until(lambda: rows_of_passes(pool, held, clients) == [30, 60])


def rows_of_passes(pool: ThreadPoolExecutor, held: Held, clients: Sequence[Client]) -> list[int]:
    """While the host computes for the first of them, both ask."""
    held.rows.clear()
    first = pool.submit(clients[0].forward, tokens(0))
    assert held.begun.acquire(timeout=30)
    joined = [pool.submit(client.forward, tokens(seed)) for seed, client in enumerate(clients, 1)]
    until(lambda: [client.stats().hosts[0].queue_tokens for client in clients] == [60, 30])
    held.leave.release(3)
    for seed, future in enumerate((first, *joined)):
        assert_close(future.result(timeout=30).hidden_states, MoELayer(**LAYERS[0])(tokens(seed)))
    for _ in held.rows[1:]:
        assert held.begun.acquire(timeout=30)
    for _ in range(3 - len(held.rows)):
        assert held.leave.acquire(timeout=30)
    return list(held.rows)
