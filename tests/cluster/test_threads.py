"""Hosts as threads of one process: a service without Ray, by every public way to it."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from moeserve import Client, ConfigError, MoELayer, load_config, serve
from moeserve.errors import ServiceUnreachable
from moeserve.experts import measured
from moeserve.programs.deploy import Deployer
from tests.support.closeness import assert_close
from tests.support.harness import Killed, ServiceHarness
from tests.support.held import Held
from tests.support.processes import descendants, moeserve
from tests.support.waiting import until

LAYER = {"hidden_size": 16, "intermediate_size": 32, "num_experts": 4}
CONFIG = {"layers": [LAYER], "placement": {"num_hosts": 2}, "server": {"port": 0, "metrics_port": 0}}
ROWS = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))

IN_A_PROGRAM = """
import sys, moeserve
with moeserve.serve({config!r}, cluster="threads") as service, moeserve.Client(service.target) as client:
    assert service.scale(3) == 2 and service.drain_host("host-0") == 3
    print([host.name for host in client.stats().hosts], "ray" in sys.modules)
"""


def test_in_a_program_it_needs_no_ray() -> None:
    config = {**CONFIG, "ray": {"num_cpus": 4}}
    run = subprocess.run(
        [sys.executable, "-c", IN_A_PROGRAM.format(config=config)], capture_output=True, text=True, timeout=120, check=False
    )
    assert run.stdout == "['host-1', 'host-2'] False\n", run.stderr


INTERRUPTED = """
import moeserve
moeserve.serve({config!r}, lambda line: print(line, flush=True), cluster="threads")
"""


def test_a_program_that_is_interrupted_while_hosts_load() -> None:
    """Their threads are in compiled code, and do not abort the program at its end."""
    layers = [{**LAYER, "hidden_size": 64, "intermediate_size": 64, "num_experts": 256}] * 64
    program = INTERRUPTED.format(config={**CONFIG, "layers": layers})
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while not next(process.stdout).startswith("loading"):
            pass
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT and err.endswith("KeyboardInterrupt\n"), err


KILLED = """
import os, signal, moeserve
service = moeserve.serve({config!r}, cluster="threads")
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_next_one_removes_what_one_that_was_killed_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        place, environment = Path(name), {**os.environ, "TMPDIR": name}
        run = subprocess.run([sys.executable, "-c", KILLED.format(config=CONFIG)], timeout=120, env=environment, check=False)
        (left,) = place.iterdir()
        assert run.returncode == -signal.SIGKILL and list(left.glob("host-*.sock"))
        monkeypatch.setattr(tempfile, "tempdir", name)
        with serve(CONFIG, cluster="threads"):
            assert not left.exists()
        assert not list(place.iterdir())


def test_sockets_are_where_temp_dir_says() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        with serve({**CONFIG, "ray": {"temp_dir": name}}, cluster="threads"):
            assert len(list(Path(name).glob("moeserve-*/host-*.sock"))) == 2
        assert not list(Path(name).iterdir())


AT_THE_END = """
import atexit, moeserve
service = moeserve.serve({config!r}, cluster="threads")
atexit.register(lambda: print("stopped"))
atexit.register(service.stop)
"""


def test_a_program_that_stops_it_at_its_end() -> None:
    """Python has closed its pools of threads by then."""
    run = subprocess.run([sys.executable, "-c", AT_THE_END.format(config=CONFIG)], capture_output=True, text=True, timeout=120, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "stopped\n", "")


def test_kernels_are_chosen_for_the_threads_that_hosts_compute_with(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Not for as many as whoever loads their experts happens to have."""
    before = torch.get_num_threads()
    measured.cache_clear()
    torch.set_num_threads(3)
    try:
        with caplog.at_level(logging.INFO), ServiceHarness({**CONFIG, "layers": [LAYER | {"hidden_size": 40}]}, "local", tmp_path):
            said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("kernel for experts")]
    finally:
        torch.set_num_threads(before)
    assert len(said) == 1 and "swiglu, 40 x 32, 1 thread:" in said[0], said


def test_it_is_stopped_by_several_threads_and_changes_nothing_afterwards() -> None:
    service, together = serve(CONFIG, cluster="threads"), threading.Barrier(3)

    def stop() -> None:
        together.wait()
        service.stop()

    with ThreadPoolExecutor(3) as pool:
        for stopping in [pool.submit(stop) for _ in range(3)]:
            stopping.result()
    with pytest.raises(ServiceUnreachable, match=r"^this service at 127\.0\.0\.1:\d+ has been stopped$"):
        service.scale(3)
    service.stop()


def test_the_verb(tmp_path: Path) -> None:
    toml = tmp_path / "service.toml"
    toml.write_text("[[layers]]\nhidden_size = 16\nintermediate_size = 32\nnum_experts = 4\n[placement]\nnum_hosts = 2\n")
    command = ("serve", str(toml), "--cluster", "threads", "--port", "0", "--metrics-port", "0")
    with moeserve(*command, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        ready = next(line for line in process.stderr if line.startswith("ready "))
        with Client(ready.split()[1]) as client:
            assert_close(client.forward(ROWS).hidden_states, MoELayer(**LAYER)(ROWS))
        assert not descendants(process.pid)
        process.terminate()
        assert process.wait(60) == 0


def test_a_host_that_fails_starts_again(tmp_path: Path) -> None:
    with ServiceHarness(CONFIG, "local", tmp_path) as service, Client(service.target) as client:
        expected = client.forward(ROWS).hidden_states
        before = service.hosts[0].info
        held = Held(service.hosts[0])
        held.error = Killed()
        held.let_go()
        assert_close(client.forward(ROWS).hidden_states, expected)
        until(lambda: client.stats().hosts[0].restarts == 1)
        assert service.hosts[0].info != before


def test_the_number_of_hosts_is_bounded_as_on_a_local_ray() -> None:
    with (
        serve({**CONFIG, "ray": {"num_cpus": 2}}, cluster="threads") as service,
        pytest.raises(ConfigError, match=r"num_hosts is 3 .* there is room for 2"),
    ):
        service.scale(3)


def test_what_ray_says_may_stand_in_cluster(tmp_path: Path) -> None:
    config = load_config({**CONFIG, "cluster": {"kind": "ray", "namespace": "here", "num_cpus": 3}})
    assert (config.cluster.kind, config.ray.namespace, config.ray.num_cpus) == ("ray", "here", 3)
    toml = tmp_path / "service.toml"
    toml.write_text('[model]\ncheckpoint = "model"\n[cluster]\ntemp_dir = "t"\n')
    assert load_config(toml).ray.temp_dir == tmp_path / "t"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"cluster": {"kind": "slurm"}}, r"cluster\.kind: .* 'ray' or 'threads' .*'slurm'"),
        (
            {"cluster": {"kind": "threads"}, "ray": {"address": "auto"}},
            r"ray\.address is 'auto'; with cluster\.kind = 'threads' there is no Ray",
        ),
        ({"cluster": {"num_cpus": 1}, "ray": {"num_cpus": 2}}, r"cluster\.num_cpus and ray\.num_cpus are the same key: give one of them"),
        ({"cluster": {"kinds": "ray"}}, r"cluster\.kinds is not a key of the configuration"),
    ],
)
def test_what_cannot_be(changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load_config({**CONFIG, **changes})


def test_threads_cannot_be_deployed() -> None:
    with pytest.raises(ConfigError, match=r"cluster\.kind is 'threads'; allowed with deploy: 'ray'"):
        Deployer(load_config({**CONFIG, "cluster": {"kind": "threads"}}))
