"""Hosts as real Ray actors: pinned, found, killed, back again."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Awaitable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

from moeserve import BackgroundService, Client, MoELayer
from moeserve.cluster.ray_host_actor import HostActor
from moeserve.cluster.ray_internals import prestart_worker
from moeserve.cluster.ray_spare import SETTINGS, are_kept
from moeserve.cluster.ray_where import this_node
from tests.support.closeness import assert_close
from tests.support.ray_service import NUM_HOSTS, metric, processes
from tests.support.waiting import until

pytestmark = pytest.mark.ray


def test_every_host_is_pinned_to_a_gpu_of_its_own(service: BackgroundService) -> None:
    with Client(service.target) as client:
        hosts = client.stats().hosts
    assert len(hosts) == NUM_HOSTS
    gpus = {host.cuda_visible_devices for host in hosts}
    assert len(gpus) == NUM_HOSTS and gpus <= {str(gpu) for gpu in range(8)}
    assert all(host.up and host.weights_bytes > 0 for host in hosts)
    assert len(processes()["ray::ExpertHost"]) == NUM_HOSTS


@pytest.mark.parametrize("layer", range(4))
def test_answers_equal_the_layer_in_one_process(service: BackgroundService, tiny_moe: Path, layer: int) -> None:
    local = MoELayer.from_checkpoint(tiny_moe, layer, dtype=torch.float32)
    hidden_states = torch.randn(100, local.spec.hidden_size)
    with Client(service.target) as client:
        out = client.forward(hidden_states, layer=layer)
    assert_close(out.hidden_states, local(hidden_states))


def test_only_loopback_addresses_listen(service: BackgroundService) -> None:
    """Nobody outside this machine can reach Ray, the hosts, gRPC or the metrics."""
    mine = {os.getpid(), *descendants(os.getpid())}
    listening = subprocess.run(["ss", "-H", "-ltnp"], capture_output=True, text=True, check=True).stdout.splitlines()
    ours = [line for line in listening if any(f"pid={pid}," in line for pid in mine)]
    assert len(ours) >= 3, "Ray, gRPC and metrics listen somewhere"
    exposed = [line for line in ours if not line.split()[3].startswith(("127.0.0.1:", "[::1]:", "[::ffff:127.0.0.1]:"))]
    assert not exposed


def descendants(pid: int) -> set[int]:
    children: dict[int, list[int]] = {}
    for line in subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout.splitlines():
        child, parent = map(int, line.split())
        children.setdefault(parent, []).append(child)
    found: set[int] = set()
    todo = [pid]
    while todo:
        for child in children.get(todo.pop(), []):
            found.add(child)
            todo.append(child)
    return found


def test_sockets_and_token_are_private(service: BackgroundService) -> None:
    folders = [path for path in Path("/tmp").glob("moeserve-*") if list(path.glob("*.sock"))]
    assert folders
    for folder in folders:
        assert folder.stat().st_mode & 0o777 == 0o700
        assert all(path.stat().st_mode & 0o077 == 0 for path in folder.iterdir())


def test_a_killed_host_loses_nobodys_request_and_comes_back(service: BackgroundService, tiny_moe: Path) -> None:
    """kill -9 under load from 4 clients: every request is answered, and answered right, without anybody's help.

    It comes back in a process that had been started ahead of time.
    """
    local = MoELayer.from_checkpoint(tiny_moe, 1, dtype=torch.float32)
    hidden_states = torch.randn(8, local.spec.hidden_size)
    expected = local(hidden_states)
    restarts = metric(service, "moeserve_host_restarts_total")
    known = idle()
    prestart_worker(this_node())  # others on this Ray may have used the one that there was
    spares = until(lambda: idle() - known)
    victim = processes()["ray::ExpertHost"][0]
    warm, recovered = threading.Barrier(5, timeout=60), threading.Event()

    def load() -> None:
        with Client(service.target, timeout=60.0) as client:

            def ask(times: int) -> None:
                for _ in range(times):
                    assert_close(client.forward(hidden_states, layer=1).hidden_states, expected)

            ask(20)
            warm.wait()
            while not recovered.is_set():
                ask(1)
            ask(20)

    with ThreadPoolExecutor() as pool:
        loads = [pool.submit(load) for _ in range(4)]
        warm.wait()
        os.kill(victim, signal.SIGKILL)
        try:
            until(lambda: metric(service, "moeserve_host_restarts_total") == restarts + 1)
        finally:
            recovered.set()
        for future in loads:
            future.result(timeout=90)
    assert metric(service, "moeserve_host_up") == NUM_HOSTS
    assert victim not in processes()["ray::ExpertHost"]
    assert (known | spares) & set(processes()["ray::ExpertHost"])
    until(lambda: idle() - known - spares)  # for the next one


def idle() -> set[int]:
    """Processes that wait for the next host."""
    return set(processes().get("ray::IDLE", []))


def test_how_a_cluster_gets_them_is_documented(service: BackgroundService) -> None:
    text = (Path(__file__).parents[2] / "docs" / "ray.md").read_text()
    assert all(f"{name}={value}" in text for name, value in SETTINGS.items())
    assert are_kept()


def test_health_says_so_while_a_host_is_away(service: BackgroundService) -> None:
    with grpc.insecure_channel(service.target) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        states = health.Watch(health_pb2.HealthCheckRequest(service="model.layers.2.mlp"), timeout=60)
        assert next(states).status == health_pb2.HealthCheckResponse.SERVING
        os.kill(processes()["ray::ExpertHost"][-1], signal.SIGKILL)
        assert next(states).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert next(states).status == health_pb2.HealthCheckResponse.SERVING
        assert health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING


def test_a_host_that_hangs_is_started_again(service: BackgroundService, tiny_moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers, controller = HostActor.answers, service._service.controller

    def pids() -> dict[str, int]:
        return {host.name: host.pid for host in controller.status().hosts if host.is_up}

    # Hosts that an earlier test has killed may have come back without being known yet.
    until(lambda: sorted(pids().values()) == sorted(processes()["ray::ExpertHost"]))
    before = pids()

    def quickly(host: HostActor, timeout_s: float) -> Awaitable[bool]:
        """Of this one; the others may be slow where the machine is busy."""
        return answers(host, 2.0 if host.name == "host-2" else timeout_s)

    monkeypatch.setattr(HostActor, "answers", quickly)
    os.kill(before["host-2"], signal.SIGSTOP)
    after = until(lambda: (found := pids()).keys() == before.keys() and found["host-2"] != before["host-2"] and found)
    assert {name for name, pid in after.items() if pid != before[name]} == {"host-2"}
    local = MoELayer.from_checkpoint(tiny_moe, 0, dtype=torch.float32)
    hidden_states = torch.randn(100, local.spec.hidden_size)
    with Client(service.target) as client:
        assert_close(client.forward(hidden_states, layer=0).hidden_states, local(hidden_states))
