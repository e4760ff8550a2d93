"""A service deployed on a Ray cluster of three nodes on this machine, from its deployment to its end.

Run by test_deploy.py in a process of its own; every line it prints is something seen.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from ray.cluster_utils import Cluster

from moeserve import Client, ConfigError, ExpertUnavailable, MoELayer, load_config
from moeserve.client import AdminClient
from moeserve.cluster.ray_internals import ClusterFromOutside, allow_clusters
from moeserve.programs.deploy import Deployed, Deployer
from tests.support.closeness import assert_close
from tests.support.ray_service import processes
from tests.support.waiting import until

allow_clusters(False)  # every port on 127.0.0.1
CALLERS = 4
#: of a caller between two questions: whoever starts meanwhile needs the processors, too
PAUSE_S = 0.05


def say(*words: object) -> None:
    print(*words, flush=True)


@contextmanager
def load(target: str, references: list[MoELayer]) -> Iterator[Callable[[], None]]:
    """Callers that never stop asking, each answer compared; what is yielded waits until all have had a few more."""
    stop, answered = threading.Event(), threading.Semaphore(0)

    def caller(number: int) -> int:
        count = 0
        with Client(target) as client:
            while not stop.wait(PAUSE_S):
                layer, rows = count % len(references), torch.randn(8, 128, generator=torch.Generator().manual_seed(1000 * number + count))
                assert_close(client.forward(rows, layer=layer).hidden_states, references[layer](rows))
                count += 1
                answered.release()
        return count

    def goes_on() -> None:
        for _ in range(4 * CALLERS):
            assert answered.acquire(timeout=90)

    with ThreadPoolExecutor(CALLERS) as pool:
        running = [pool.submit(caller, number) for number in range(CALLERS)]
        try:
            yield goes_on
        finally:
            stop.set()
        say("answered", "enough" if sum(future.result() for future in running) > 20 * CALLERS else "too few")


NAMES = ("ray::ExpertHost", "ray::MoEFrontend", "ray::MoEController")


class Scene:
    """A cluster with a head that holds nothing and two nodes of two CPUs, and what runs there since then."""

    def __init__(self, folder: Path, checkpoint: Path) -> None:
        (folder / "admin-token").write_text("secret")
        self.config = folder / "service.toml"
        self.config.write_text(
            f'[model]\ncheckpoint = "{checkpoint}"\ndtype = "float32"\n[placement]\nnum_hosts = 2\n[controller]\ncontrol_port = 0\n'
            f'[server]\nport = 0\nmetrics_port = 0\nadmin_token_file = "{folder}/admin-token"\ndrain_timeout_s = 5.0\n'
        )
        quick = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 3}
        head = {"num_cpus": 0, "include_dashboard": False, "_system_config": quick}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.nodes = [self.cluster.add_node(num_cpus=2) for _ in range(2)]

    def pids(self, name: str) -> list[int]:
        return processes().get(name, [])

    def deploy(self, **overrides: dict[str, object]) -> Deployed:
        deployer = Deployer(load_config(self.config, {"ray": {"address": self.cluster.address}, **overrides}))
        deployer.join()
        try:
            return asyncio.run(deployer.deploy(say))
        finally:
            deployer.close()

    def command(self, verb: str, target: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "moeserve", verb, target, "--admin-token-file", str(self.config.parent / "admin-token"), *arguments]
        return subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)

    @contextmanager
    def followed(self, target: str) -> Iterator[subprocess.Popen[str]]:
        """`moeserve events --follow`, which has told the first event."""
        line = [
            sys.executable,
            "-m",
            "moeserve",
            "events",
            target,
            "--admin-token-file",
            str(self.config.parent / "admin-token"),
            "--follow",
        ]
        with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as follower:
            assert follower.stdout is not None
            follower.stdout.readline()
            yield follower


def main(folder: Path, checkpoint: Path) -> None:
    references = [MoELayer.from_checkpoint(checkpoint, layer, dtype=torch.float32) for layer in range(4)]
    scene = Scene(folder, checkpoint)
    try:
        deployed = scene.deploy()
        with AdminClient(deployed.controller, "secret") as admin, load(deployed.frontends[0], references) as goes_on:
            live(scene, deployed, admin, goes_on)
        with scene.followed(deployed.controller) as follower:
            say("shutdown", scene.command("shutdown", deployed.controller).returncode)
            say("followed to its end:", follower.wait(timeout=60))
        kept(scene)  # at once: it waits for the end of the one before
        until(lambda: not any(map(scene.pids, NAMES)))
    finally:
        scene.cluster.shutdown()
    say("done")


def kept(scene: Scene) -> None:
    """As a sidecar does it: deploys again what has been ended, and leaves it alone when it is told to go."""
    line = [sys.executable, "-m", "moeserve", "deploy", str(scene.config), "--address", scene.cluster.address, "--keep"]
    with subprocess.Popen(line, stderr=subprocess.PIPE, text=True) as keeper:
        assert keeper.stderr is not None
        told = iter(keeper.stderr)

        def controller() -> str:
            return next(line.split()[1] for line in told if line.startswith("controller "))

        with AdminClient(controller(), "secret") as admin:
            admin.shutdown()
        with AdminClient(controller(), "secret") as admin:
            next(line for line in told if line.startswith("ready "))
            keeper.send_signal(signal.SIGTERM)
            say("told to go:", list(told)[-1].strip(), keeper.wait(timeout=60))
            say("deployed again: epoch", admin.status().epoch)
            admin.shutdown()


def live(scene: Scene, deployed: Deployed, admin: AdminClient, goes_on: Callable[[], None]) -> None:
    def settled(hosts: int, short: bool = False) -> bool:
        try:
            seen = admin.status()
        except ExpertUnavailable:
            return False
        up = len(seen.hosts) == hosts and all(host.is_up for host in seen.hosts) and len(seen.frontends) == 1 and seen.frontends[0].is_ready
        return up and not seen.is_changing and bool(seen.shortage) == short

    goes_on()
    say("hosts on", len({host.node for host in admin.status().hosts}), "nodes")
    say("once more the same:", scene.deploy().controller == deployed.controller)
    for what, change in (("another", lambda: scene.deploy(placement={"num_hosts": 3})), ("five", lambda: admin.scale(5))):
        try:
            change()
        except ConfigError as error:
            say(f"{what}: {error}")
    say("four hosts: epoch", admin.scale(4).epoch)
    goes_on()

    hosts = sorted(scene.pids("ray::ExpertHost"))
    os.kill(scene.pids("ray::MoEController")[0], signal.SIGKILL)
    goes_on()
    until(lambda: settled(4))
    seen = admin.status()
    kept = sorted(host.pid for host in seen.hosts) == hosts
    say("after the controller's death: epoch", seen.epoch, "the same hosts:", kept, "frontends:", len(seen.frontends))

    with ThreadPoolExecutor(1) as pool:
        interrupted = pool.submit(admin.scale, 3)
        until(lambda: admin.status().is_changing or interrupted.done())
        os.kill(scene.pids("ray::MoEController")[0], signal.SIGKILL)
        say("interrupted:", type(interrupted.exception()).__name__)
    goes_on()
    until(lambda: settled(3) or settled(4))
    say("after an interrupted change: epoch", "higher" if admin.scale(4).epoch > seen.epoch or settled(4) else "?")
    goes_on()

    gone = scene.nodes[0].node_id[:12]
    scene.cluster.remove_node(scene.nodes[0], allow_graceful=False)
    goes_on()
    until(lambda: settled(2, short=True))
    say("after a node's death:", admin.status().shortage)
    scene.nodes[0] = scene.cluster.add_node(num_cpus=2)
    until(lambda: settled(4))
    goes_on()

    admin.scale("all")
    scene.nodes.append(scene.cluster.add_node(num_cpus=1))
    until(lambda: settled(5))
    goes_on()
    leaving = admin.status().hosts[0].node
    say("drains:", drain_node(scene.cluster.address, leaving))
    until(lambda: settled(3) and leaving not in {host.node for host in admin.status().hosts})
    goes_on()
    shown = scene.command("status", deployed.controller, "--json")
    read = json.loads(shown.stdout)
    for event in admin.events():
        names = event.why.replace(gone, "THE-ONE").replace(leaving[:12], "THE-OTHER")
        say(f"{event.kind}: {names}, {event.outcome}, {'moved' if event.moved_bytes else 'nothing moved'}")
    say("status:", read["wanted_hosts"], "wanted,", len(read["hosts"]), "hosts,", read["frontends"][0]["target"] == deployed.frontends[0])
    say(scene.command("status", deployed.controller).stdout)


def drain_node(address: str, node: str) -> bool:
    """As an autoscaler does, or whoever takes a machine away."""
    accepted, _ = ClusterFromOutside(address).drain(node, "taken away", time.time() + 600)
    return accepted


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
