"""What a batch sees of its hosts is fixed when it begins, whoever joins or leaves while a thread writes its rows."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from moeserve import Client, MoELayer
from moeserve.control import Assignment
from moeserve.placement import plan_placement
from moeserve.release import Release
from moeserve.transport import Lease, WorkShape
from tests.support.closeness import assert_close
from tests.support.harness import ServiceHarness
from tests.support.two_layers import CONFIG, LAYERS

#: enough to be written beside the event loop
ROWS = torch.randn(10_000, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("change", ["join", "leave"])
def test_hosts_that_come_and_go_while_a_batch_is_written(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, go_on = threading.Event(), threading.Event()

    with ServiceHarness(CONFIG, "local", tmp_path) as service, Client(service.target) as client, ThreadPoolExecutor() as pool:
        specs = [source.spec for source in service.sources]
        wider = Release(plan_placement(specs, service.config.placement.model_copy(update={"num_hosts": 3}), epoch=2))

        async def join() -> None:
            await service.cluster.hosts.take(wider, [Assignment(number, "this-node") for number in range(3)])
            await service.frontend.connect(wider)

        async def leave() -> None:
            await service.frontend.forget()

        if change == "leave":
            service.call(join())
        channel = service.frontend._links[0].channel
        assert channel is not None
        lease = channel.lease

        def held(shape: WorkShape) -> Lease:
            asked.set()
            assert go_on.wait(30)
            return lease(shape)

        monkeypatch.setattr(channel, "lease", held)
        answer = pool.submit(client.forward, ROWS, 0)
        try:
            assert asked.wait(30)
            service.call(join() if change == "join" else leave())
        finally:
            go_on.set()
        assert_close(answer.result(timeout=30).hidden_states, MoELayer(**LAYERS[0])(ROWS))
