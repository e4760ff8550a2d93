"""What a batch sees of its hosts is fixed when it begins, whoever joins or leaves while a thread writes its rows."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from moeserve import Client, MoELayer
from moeserve.api.request import LayerRequest
from moeserve.control import Assignment
from moeserve.frontend.batch import Admitted, Batch
from moeserve.frontend.callers import Caller
from moeserve.placement import plan_placement
from moeserve.release import Release
from moeserve.transport import Lease, WorkShape
from tests.support.closeness import assert_close
from tests.support.harness import ServiceHarness, received
from tests.support.seen import gone
from tests.support.two_layers import CONFIG, LAYERS
from tests.support.waiting import until

#: enough to be written beside the event loop
ROWS = torch.randn(10_000, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("change", ["join", "leave"])
def test_hosts_that_come_and_go_while_a_batch_is_written(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, go_on = threading.Event(), threading.Event()

    in_one_turn = {**CONFIG, "batching": {"max_batch_tokens": len(ROWS)}}
    with ServiceHarness(in_one_turn, "local", tmp_path) as service, Client(service.target) as client, ThreadPoolExecutor() as pool:
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


def test_another_view_runs_only_what_is_not_answered(tmp_path: Path) -> None:
    """Two requests of one batch: one is answered while the other waits for a host that was lost, until there is another release."""
    layer = {"hidden_size": 16, "intermediate_size": 24, "num_experts": 8}
    with ServiceHarness({"layers": [layer], "placement": {"num_hosts": 2}}, "local", tmp_path) as service:
        answered, waiting = (asking_for(service, experts) for experts in ([0, 1], [5, 6]))
        service.hosts[1].stop()
        service.call(gone(service, 1))
        running = service._thread.submit(service.frontend._forwards[0].run(Batch([answered, waiting])))
        until(answered.answer.done)
        specs = [source.spec for source in service.sources]
        newer = Release(plan_placement(specs, service.config.placement, epoch=2))

        async def publish() -> None:
            await service.frontend.prepare(newer, service.sources)
            service.frontend.publish(newer)

        service.call(publish())
        service.hosts[1].start()
        service.call(service.cluster.hosts.take(newer, [Assignment(number, "this-node") for number in range(2)]))
        running.result(timeout=30)
        reference = MoELayer(**layer)
        for one in (answered, waiting):
            request = one.request
            expected = reference.run(request.hidden_states, topk_ids=request.topk_ids, topk_weights=request.topk_weights)
            assert_close(one.answer.result().hidden_states, expected.hidden_states)
        assert service.frontend.stats().layers[0].processed.tolist() == [3, 3, 0, 0, 0, 3, 3, 0]
        assert received(service.hosts[0]) == 1, "what was answered is not asked for again"


def asking_for(service: ServiceHarness, experts: list[int]) -> Admitted:
    request = LayerRequest(ROWS[:3], topk_ids=torch.tensor([experts] * 3), topk_weights=torch.full((3, 2), 0.5))

    async def admitted() -> Admitted:
        return Admitted(request, Caller("", 0, 0), time.monotonic() + 30, asyncio.get_running_loop().create_future())

    return service.call(admitted())
