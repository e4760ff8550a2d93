"""A round of balancing goes no further when callers notice it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from moeserve import AsyncClient, ExpertUnavailable, MoELayer
from moeserve.client import AdminClient
from moeserve.experts import ExpertBank
from tests.support.closeness import assert_close
from tests.support.harness import ServiceHarness
from tests.support.waiting import until, until_async

ADMIN = "of the administrator"
LAYER = {"hidden_size": 16, "intermediate_size": 8, "num_experts": 8, "seed": 3, "gating": {"top_k": 1}}
ROWS = 16
FEW, MANY = 2, 40  # the first call of each takes longer, and is less than one in a hundred
SLOW = r"one call in a hundred takes more than \d+\.\d ms since the round began, and \d+\.\d ms before: nothing more moves"


@contextmanager
def called(target: str, callers: int) -> Iterator[None]:
    """By so many, who ask for the experts of the first host only, and check every answer."""
    stop, rows = threading.Event(), torch.randn(ROWS, 16, generator=torch.Generator().manual_seed(0))
    routed: dict[str, Any] = {"topk_ids": torch.arange(ROWS).remainder(4)[:, None], "topk_weights": torch.ones(ROWS, 1)}
    right = MoELayer(**LAYER).run(rows, **routed).hidden_states

    async def call(client: AsyncClient) -> None:
        while not stop.is_set():
            assert_close((await client.forward(rows, **routed)).hidden_states, right)

    async def all_of_them() -> None:
        async with AsyncClient(target) as client:
            await asyncio.gather(*(call(client) for _ in range(callers)))

    with ThreadPoolExecutor(1) as pool:
        calling = pool.submit(asyncio.run, all_of_them())
        try:
            yield
        finally:
            stop.set()
            calling.result()


def test_a_round_stops_when_calls_take_longer_and_the_next_one_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow, begun, may_end, run = threading.Event(), threading.Event(), threading.Event(), ExpertBank.run

    def run_slowly(self: ExpertBank, hidden_states: torch.Tensor, *args: Any, **more: Any) -> None:
        if slow.is_set():
            time.sleep(0.7)
        run(self, hidden_states, *args, **more)

    monkeypatch.setattr(ExpertBank, "run", run_slowly)
    (tmp_path / "admin").write_text(ADMIN)
    (tmp_path / "admin").chmod(0o600)
    config = {
        "layers": [LAYER],
        "placement": {"num_hosts": 2},
        "server": {"admin_token_file": tmp_path / "admin"},
        "balancing": {"max_moved_bytes": 1, "window_s": 600.0},
    }
    with ServiceHarness(config, "local", tmp_path) as service, AdminClient(service.target, ADMIN) as admin:
        take = service.cluster.hosts.take

        async def take_slowly(*args: Any) -> None:
            begun.set()
            await until_async(may_end.is_set)
            await take(*args)

        def answered() -> int:
            return sum(sum(report.call_times) for report in service.frontends.members())

        with called(service.target, FEW):
            until(lambda: answered() > 400 and admin.rebalance(dry_run=True).steps > 2)
        monkeypatch.setattr(service.cluster.hosts, "take", take_slowly)
        with ThreadPoolExecutor(1) as pool:
            rebalancing = pool.submit(admin.rebalance)
            assert begun.wait(60)
            before = answered()
            slow.set()  # as if reading kept hosts from computing
            with called(service.target, MANY):
                until(lambda: answered() > before + 3 * MANY)
                slow.clear()
            may_end.set()
            with pytest.raises(ExpertUnavailable, match=SLOW):
                rebalancing.result()
        (stopped,) = (event for event in admin.events() if event.kind == "balance")
        assert (stopped.outcome, stopped.epoch, stopped.moves + stopped.new) == ("stopped", 2, 1), "what is done stays"
        assert stopped.what.startswith("1 of ") and "one call in a hundred takes more than" in stopped.error
        until(lambda: service.metrics.registry.get_sample_value("moeserve_rebalances_total", {"outcome": "stopped"}) == 1)
        assert admin.rebalance().balancedness > 0.9, "nobody calls, so nothing becomes slower"
