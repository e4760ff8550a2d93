"""A Ray cluster of two nodes in two networks, a service over both, and the wire between them cut. Run by test_two_networks.py.

In a process of its own, which moves to the network of the first node.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from tests.support.processes import descendants, signal_all
from tests.support.waiting import until
from tests.support.wire import ADDRESSES, CUT, Link, NoWire, Wire

ADDRESS = f"{ADDRESSES[0]}:6379"
LAYER = {"hidden_size": 64, "intermediate_size": 32, "num_experts": 8}
CONFIG = {
    "layers": [LAYER],
    "placement": {"num_hosts": 2, "copies": 2, "wait_for_nodes_s": 60, "node_strategy": "strict_spread"},
    "server": {"port": 0, "metrics_port": 0},
    "ray": {"address": ADDRESS},
}


@contextmanager
def node(wire: Wire, side: int, *options: str) -> Iterator[None]:
    """A node of the cluster in one of the networks; its processes end with it."""
    command = [str(Path(sys.executable).with_name("ray")), "start", "--block", f"--node-ip-address={ADDRESSES[side]}", "--num-cpus=1"]
    with wire.inside(side):
        process = subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with process:
        try:
            yield
        finally:
            signal_all([*descendants(process.pid), process.pid], signal.SIGKILL)


def is_open() -> bool:
    with closing(socket.socket()) as sock:
        return sock.connect_ex((ADDRESSES[0], 6379)) == 0


def disturb(wire: Wire) -> None:
    from moeserve import BackgroundService, serve
    from tests.support.callers import Callers
    from tests.support.ray_service import metric

    def is_up(service: BackgroundService) -> bool:
        return metric(service, "moeserve_host_up") == 2

    with serve(CONFIG, progress=lambda line: print(line, flush=True)) as service, Callers(service.target, LAYER) as callers:
        callers.until_each(5)
        wire.set(CUT)
        callers.until_each(5)
        assert not is_up(service)
        wire.set(Link())
        until(lambda: is_up(service))
        callers.until_each(5)
        print(f"nobody failed, slowest {callers.slowest_s:.2f} s", flush=True)


def main() -> None:
    with Wire() as wire, tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder:
        wire.enter(0)
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32), RAY_USAGE_STATS_ENABLED="0")
        with node(wire, 0, "--head", "--port=6379", "--include-dashboard=false", f"--temp-dir={folder}"):
            until(is_open)
            with node(wire, 1, f"--address={ADDRESS}"):
                disturb(wire)


if __name__ == "__main__":
    try:
        main()
    except NoWire as error:
        print(f"skipped: {error}", flush=True)
