"""Real hosts come, go and are replaced under load: nobody notices but the placement."""

from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import moeserve
from moeserve import Client, ConfigError, ExpertUnavailable, MoELayer
from moeserve.client import AdminClient
from tests.support.closeness import assert_close
from tests.support.ray_service import pid_of, processes
from tests.support.waiting import until

pytestmark = pytest.mark.ray

CALLERS = 8
#: of a caller between two questions: hosts that start meanwhile need the processors, too
PAUSE_S = 0.05


def test_two_four_two_and_every_host_replaced_under_load(tiny_moe: Path, tmp_path: Path, local_ray: None) -> None:
    config = {
        "model": {"checkpoint": tiny_moe, "dtype": "float32"},
        "placement": {"num_hosts": 2, "cpus_per_host": 0.1},
        "server": {"port": 0, "metrics_port": 0, "admin_token_file": tmp_path / "admin", "drain_timeout_s": 2.0},
    }
    references = [MoELayer.from_checkpoint(tiny_moe, layer, dtype=torch.float32) for layer in range(4)]
    (tmp_path / "admin").write_text("secret")
    before = len(processes().get("ray::ExpertHost", []))
    with moeserve.serve(config) as service:
        stop, answered = threading.Event(), threading.Semaphore(0)

        def caller(number: int) -> int:
            count = 0
            with Client(service.target) as client:
                while not stop.wait(PAUSE_S):
                    layer, seed = count % 4, 10_000 * number + count
                    rows = torch.randn(20, 128, generator=torch.Generator().manual_seed(seed))
                    assert_close(client.forward(rows, layer=layer).hidden_states, references[layer](rows))
                    count += 1
                    answered.release()
            return count

        def goes_on() -> None:
            for _ in range(5 * CALLERS):
                assert answered.acquire(timeout=60)

        with ThreadPoolExecutor(CALLERS) as pool:
            running = [pool.submit(caller, number) for number in range(CALLERS)]
            try:
                goes_on()
                assert service.scale(4) == 2
                goes_on()
                assert service.scale(2) == 3
                for old in ("host-0", "host-1"):
                    goes_on()
                    service.scale(3)
                    service.drain_host(old)
                with pytest.raises(ConfigError, match="no host 'host-0'"):
                    service.drain_host("host-0")
                with Client(service.target) as client:
                    (survivor, other) = client.stats().hosts
                assert (survivor.name, other.name) == ("host-4", "host-5")
                whole = sum(each.bank.nbytes for each in references)
                assert survivor.weights_bytes + other.weights_bytes == whole
                until(lambda: len(processes()["ray::ExpertHost"]) <= before + 2)  # those that left are gone
                goes_on()
                os.kill(pid_of(service, "host-5"), signal.SIGKILL)
                goes_on()
                os.kill(pid_of(service, "host-4"), signal.SIGSTOP)
                assert service.drain_host("host-4") == 8, "a host that hangs is left, and nobody waits for it for long"
                goes_on()
            finally:
                stop.set()
            assert sum(future.result() for future in running) > 30 * CALLERS
        with AdminClient(service.target, "secret") as admin:
            admin.shutdown()
        with Client(service.target) as client, pytest.raises(ExpertUnavailable):
            while True:
                client.layers()
        service.stop()
    until(lambda: len(processes().get("ray::ExpertHost", [])) <= before)
