"""Hosts come and go while requests run: none fails, none is wrong."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from moeserve import Client, ConfigError, MoELayer
from tests.support.closeness import assert_close
from tests.support.harness import CHANNELS, Kind, ServiceHarness
from tests.support.held import Held
from tests.support.seen import gone
from tests.support.two_layers import CONFIG, LAYERS, Load, tokens
from tests.support.waiting import until, until_async


@pytest.mark.parametrize("pattern", ["all_to_all", "ring"])
@pytest.mark.parametrize("kind", CHANNELS)
def test_from_two_to_six_to_two_under_load(kind: Kind, pattern: str, tmp_path: Path) -> None:
    with ServiceHarness({**CONFIG, "communication": {"pattern": pattern}}, kind, tmp_path) as service, Load(service.target, 4) as load:
        for wanted, epoch in ((6, 2), (3, 3), (2, 4)):
            load.goes_on()
            release = service.call(service.controller.scale(wanted))
            assert (release.epoch, len(release.placement.hosts), len(service.hosts)) == (epoch, wanted, wanted)
            until(lambda: service.metrics.registry.get_sample_value("moeserve_wanted_hosts") == wanted)  # noqa: B023
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
            (service.controller.scale(0), "num_hosts is 0; allowed: at least 1"),
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
            service.call(until_async(lambda: service.frontend.stats().queue_tokens == 2 * len(rows)))
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
            service.call(until_async(lambda: service.frontend._links[1].queue_tokens > 0))
            drained = pool.submit(service.call, service.controller.drain("host-1"))
            for layer, future in enumerate(waiting):
                assert_close(future.result(timeout=30).hidden_states, MoELayer(**LAYERS[layer])(rows))
            for bank in held:
                bank.leave.release(10)
            assert drained.result(timeout=30).placement.hosts == (0, 2)
