"""A host process that is stopped, with copies of its experts elsewhere: a non-event."""

from __future__ import annotations

import os
import signal

import pytest

from moeserve import Client, serve
from tests.support.ray_service import metric, pid_of
from tests.support.two_layers import LAYERS, Load
from tests.support.waiting import until

pytestmark = pytest.mark.ray


def test_a_stopped_host_is_a_non_event_and_comes_back_by_a_canary(local_ray: None) -> None:
    config = {"layers": LAYERS, "placement": {"num_hosts": 3, "copies": 2, "cpus_per_host": 0.1}, "server": {"port": 0, "metrics_port": 0}}
    with serve(config) as service, Client(service.target) as client:

        def state() -> str:
            return next(host.state for host in client.stats().hosts if host.name == "host-1")

        pid = pid_of(service, "host-1")
        with Load(service.target, 3) as load:
            load.goes_on()
            os.kill(pid, signal.SIGSTOP)
            try:
                until(lambda: state() == "out")
                load.goes_on(60)
                assert metric(service, "moeserve_host_state", host="host-1", state="out") == 1
            finally:
                os.kill(pid, signal.SIGCONT)
            until(lambda: state() in ("up", "slow"))
            load.goes_on()
        until(lambda: pid_of(service, "host-1") == pid)
        assert "host_out" in [event.kind for event in client.stats().events]
        assert {call.code for call in client.stats().calls if call.method == "Forward"} == {"OK"}
