"""Hosts come and go while requests run: none fails, none is wrong."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from moeserve import Client, ConfigError, MoELayer
from tests.frontend.test_failure import gone, until
from tests.service.test_pipeline import Held
from tests.support.closeness import assert_close
from tests.support.harness import CHANNELS, Kind, ServiceHarness

LAYERS = [{"hidden_size": 16, "intermediate_size": 24, "num_experts": 8, "seed": seed, "gating": {"top_k": 3}} for seed in range(2)]
CONFIG = {"layers": LAYERS, "placement": {"num_hosts": 2}}


def tokens(seed: int) -> torch.Tensor:
    return torch.randn(30, 16, generator=torch.Generator().manual_seed(seed))


class Load:
    """Callers that ask without pause, and compare every answer with the layer in this process."""

    def __init__(self, target: str, callers: int) -> None:
        self._references = [MoELayer(**layer) for layer in LAYERS]
        self._target, self._callers = target, callers
        self._stop, self._answered = threading.Event(), threading.Semaphore(0)

    def __enter__(self) -> Load:
        self._pool = ThreadPoolExecutor(self._callers)
        self._running = [self._pool.submit(self._call, number) for number in range(self._callers)]
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown()
        assert sum(future.result() for future in self._running) > 0

    def goes_on(self, answers: int = 30) -> None:
        for _ in range(answers):
            assert self._answered.acquire(timeout=30)

    def _call(self, number: int) -> int:
        count = 0
        with Client(self._target) as client:
            while not self._stop.is_set():
                seed, layer = 10_000 * number + count, count % 2
                assert_close(client.forward(tokens(seed), layer=layer).hidden_states, self._references[layer](tokens(seed)))
                count += 1
                self._answered.release()
        return count


@pytest.mark.parametrize("pattern", ["all_to_all", "ring"])
@pytest.mark.parametrize("kind", CHANNELS)
def test_from_two_to_six_to_two_under_load(kind: Kind, pattern: str, tmp_path: Path) -> None:
    with ServiceHarness({**CONFIG, "communication": {"pattern": pattern}}, kind, tmp_path) as service, Load(service.target, 4) as load:
        for wanted, epoch in ((6, 2), (3, 3), (2, 4)):
            load.goes_on()
            release = service.call(service.controller.scale(wanted))
            assert (release.epoch, len(release.placement.hosts), len(service.hosts)) == (epoch, wanted, wanted)
        load.goes_on()
        with Client(service.target) as client:
            stats = client.stats()
        assert [host.name for host in stats.hosts] == ["host-0", "host-1"]
        assert sorted(expert for held in stats.layers[0].placement for expert in held.experts) == list(range(8))
        assert service.metrics.registry.get_sample_value("moeserve_host_up", {"host": "host-5"}) is None


def test_every_host_is_replaced_under_load(tmp_path: Path) -> None:
    with ServiceHarness(CONFIG, "local", tmp_path) as service, Load(service.target, 4) as load:
        for old in ("host-0", "host-1"):
            service.call(service.controller.scale(3))
            load.goes_on()
            service.call(service.controller.drain(old))
            load.goes_on()
        assert service.controller.state.release.placement.hosts == (2, 3)


def test_a_host_that_dies_after_a_change_comes_back_with_what_it_has_now(tmp_path: Path) -> None:
    with ServiceHarness(CONFIG, "local", tmp_path) as service, Load(service.target, 2) as load:
        service.call(service.controller.scale(3))
        for host in service.hosts:
            host.stop()
            host.start()
            load.goes_on()


def test_what_cannot_be_leaves_everything_as_it_was(tmp_path: Path) -> None:
    with ServiceHarness(CONFIG, "local", tmp_path) as service, Load(service.target, 2) as load:
        for change, sentence in (
            (service.controller.scale(17), r"placement\.num_hosts is 17; allowed: at most \d+, the number of physical experts"),
            (service.controller.scale(0), "at least one host is needed"),
            (service.controller.drain("host-7"), "there is no host 'host-7'; there are host-0, host-1"),
        ):
            with pytest.raises(ConfigError, match=sentence):
                service.call(change)
            load.goes_on()
            assert service.controller.state.release.epoch == 1
        assert service.call(service.controller.scale(2)).epoch == 1, "nothing to do"


@pytest.mark.parametrize("kind", CHANNELS)
def test_a_host_that_never_comes_back_is_left_and_those_who_wait_for_it_are_answered(kind: Kind, tmp_path: Path) -> None:
    rows = tokens(0)
    with ServiceHarness({**CONFIG, "placement": {"num_hosts": 3}}, kind, tmp_path) as service, ThreadPoolExecutor() as pool:
        service.hosts[1].stop()
        service.call(gone(service, 1))
        with Client(service.target) as client:
            waiting = [pool.submit(client.forward, rows, layer) for layer in (0, 1)]
            service.call(until(lambda: service.frontend.stats().queue_tokens == 2 * len(rows)))
            assert not any(future.done() for future in waiting)
            assert service.call(service.controller.drain("host-1")).placement.hosts == (0, 2)
            for layer, future in enumerate(waiting):
                assert_close(future.result(timeout=30).hidden_states, MoELayer(**LAYERS[layer])(rows))
            assert client.ready()


def test_a_host_that_hangs_is_left_too(tmp_path: Path) -> None:
    """Its answers never come, and nothing says so: after server.drain_timeout_s the batches that wait for it begin again elsewhere."""
    rows = tokens(0)
    config = {**CONFIG, "placement": {"num_hosts": 3}, "server": {"port": 0, "drain_timeout_s": 0.2}}
    with ServiceHarness(config, "shm", tmp_path) as service, ThreadPoolExecutor() as pool:
        held = [Held(service.hosts[1], layer) for layer in (0, 1)]
        with Client(service.target) as client:
            waiting = [pool.submit(client.forward, rows, layer) for layer in (0, 1)]
            service.call(until(lambda: service.frontend._links[1].queue_tokens > 0))
            drained = pool.submit(service.call, service.controller.drain("host-1"))
            for layer, future in enumerate(waiting):
                assert_close(future.result(timeout=30).hidden_states, MoELayer(**LAYERS[layer])(rows))
            for bank in held:
                bank.leave.release(10)
            assert drained.result(timeout=30).placement.hosts == (0, 2)
