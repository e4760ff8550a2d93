"""A service whose second host is in another network, behind a wire that is disturbed. Run by test_partition.py in a process of its own."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from moeserve import Client, MoELayer
from moeserve.host import Host, Where
from tests.support.callers import Callers
from tests.support.closeness import assert_close
from tests.support.harness import ServiceHarness, TestFleet, received
from tests.support.waiting import until
from tests.support.wire import ADDRESSES, CUT, Link, NoWire, Wire

HANG_S = 0.7
HIDDEN = 256
LAYER = {"hidden_size": HIDDEN, "intermediate_size": 8, "num_experts": 4, "gating": {"top_k": 2}}
#: experts of the two hosts, if there is one copy of each
HERE, ELSEWHERE = torch.tensor([[0, 1]]), torch.tensor([[2, 3]])


class FleetOnAWire(TestFleet):
    """Host 1 is in the second network, as are all threads that it starts."""

    wire: Wire

    def _make(self, number: int, on_crash: Callable[[], None]) -> Host:
        with self.wire.inside(number):
            return super()._make(number, on_crash)


@contextmanager
def service_on(wire: Wire, copies: int) -> Iterator[ServiceHarness]:
    resilience = {"hang_after_ms": 1000 * HANG_S}
    config = {"layers": [LAYER], "placement": {"num_hosts": 2, "copies": copies}, "resilience": resilience}
    with tempfile.TemporaryDirectory() as folder:
        service = ServiceHarness(config, "tcp", Path(folder), ["here", "there"])

        def where(number: int, incarnation: int) -> Where:
            return replace(service.cluster.where(number, incarnation), endpoints=(f"tcp://{ADDRESSES[number]}:0",))

        service.cluster.hosts = FleetOnAWire(where, service.cluster._hold)
        service.cluster.hosts.wire = wire
        with service:
            yield service


def restarts(service: ServiceHarness) -> float:
    return service.metrics.registry.get_sample_value("moeserve_host_restarts_total") or 0.0


def is_up(service: ServiceHarness) -> bool:
    return service.metrics.registry.get_sample_value("moeserve_host_up", {"host": "host-1"}) == 1


def as_before(service: ServiceHarness, callers: Callers) -> None:
    """Once the wire is whole the second host is connected, and gets its share of the work."""
    until(lambda: is_up(service))
    before = received(service.hosts[1])
    callers.until_each(5)
    assert received(service.hosts[1]) > before


def with_copies_nobody_waits_for_the_wire(wire: Wire, service: ServiceHarness) -> None:
    for link in (CUT, Link(loss=(0.0, 1.0))):
        with Callers(service.target, LAYER) as callers:
            callers.until_each(1)
            wire.set(link)
            callers.until_each(5)
            assert not is_up(service)
            wire.set(Link())
            as_before(service, callers)
        print(f"copies, {link}: slowest {callers.slowest_s:.2f} s", flush=True)


def a_bad_wire_is_no_silence(wire: Wire, service: ServiceHarness) -> None:
    for link in (Link(delay_s=0.05), Link(delay_s=0.005, loss=(0.05, 0.05))):
        before = restarts(service)
        with Callers(service.target, LAYER) as callers:
            wire.set(link)
            callers.until_each(10)
            wire.set(Link())
            as_before(service, callers)
        print(f"{link}: slowest {callers.slowest_s:.2f} s, connected anew {restarts(service) - before:g} times", flush=True)
        assert any(link.loss) or restarts(service) == before


def a_large_message_on_a_slow_wire_is_no_silence(wire: Wire, service: ServiceHarness) -> None:
    """Both ways: neither the rows nor the answers are there before a host would be given up that says nothing."""
    before, rows = restarts(service), 4096
    hidden_states = torch.randn(rows, HIDDEN)
    choice = {"topk_ids": ELSEWHERE.expand(rows, 2), "topk_weights": torch.full((rows, 2), 0.5)}
    wire.set(Link(bytes_per_s=hidden_states.nbytes / (1.3 * HANG_S)))
    with Client(service.target, timeout=60) as client:
        begun, answer = time.monotonic(), client.forward(hidden_states, **choice)
    wire.set(Link())
    print(f"{hidden_states.nbytes / 2**20:.0f} MiB each way in {time.monotonic() - begun:.2f} s", flush=True)
    assert_close(answer.hidden_states, MoELayer(**LAYER).run(hidden_states, **choice).hidden_states)
    assert restarts(service) == before


def without_copies_rows_wait_for_the_wire(wire: Wire, service: ServiceHarness) -> None:
    with ThreadPoolExecutor() as pool, Client(service.target, timeout=30) as client:

        def forward(experts: torch.Tensor) -> float:
            client.forward(torch.randn(1, HIDDEN), topk_ids=experts, topk_weights=torch.ones(1, 2))
            return time.monotonic()

        wire.set(Link(loss=(1.0, 0.0)))
        waiting = pool.submit(forward, ELSEWHERE)
        until(lambda: not is_up(service))
        for _ in range(5):
            forward(HERE)
        assert not waiting.done()
        healed = time.monotonic()
        wire.set(Link())
        print(f"without copies: answered {waiting.result() - healed:.2f} s after the wire was whole", flush=True)


def main() -> None:
    with Wire() as wire:
        wire.enter(0)
        with service_on(wire, copies=2) as service:
            with_copies_nobody_waits_for_the_wire(wire, service)
            a_bad_wire_is_no_silence(wire, service)
        with service_on(wire, copies=1) as service:
            a_large_message_on_a_slow_wire_is_no_silence(wire, service)
            without_copies_rows_wait_for_the_wire(wire, service)


if __name__ == "__main__":
    try:
        main()
    except NoWire as error:
        print(f"skipped: {error}", flush=True)
