"""How long a killed host is away, and what callers notice when hosts are killed again and again.

`python benchmarks/bench_restarts.py --help`. `moeserve serve` runs in a process of its own, with two copies of every expert. First, hosts
are killed one after the other, each once the one before is back: the time from the kill until the frontend is connected to the next
incarnation. Then one is killed every few seconds, whether the one before is back or not, under calls of several clients.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import torch

import moeserve
from moeserve.client.admin import AdminClient

_LOOK_S = 0.01
_LONGEST_S = 120.0
_DEADLINE_S = 15.0
_CLIENTS, _CALLS_PER_S, _TOKENS = 4, 15, 8
CONFIG = """
[model]
checkpoint = "{checkpoint}"
[placement]
num_hosts = {hosts}
cpus_per_host = 0.5
copies = 2
[server]
port = 0
metrics_port = 0
admin_token_file = "{token_file}"
"""


@dataclass(frozen=True)
class Running:
    """`moeserve serve`, as it shows itself."""

    pid: int
    target: str
    metrics: str
    token: str

    def pids(self) -> dict[str, int]:
        """Of the hosts that are up, by name."""
        with AdminClient(self.target, self.token) as admin:
            return {host.name: host.pid for host in admin.status().hosts if host.is_up}

    def processes(self) -> list[int]:
        """Ids of all processes of hosts, as the kernel has them."""
        shown = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout.splitlines()[1:]
        rows = {int(pid): (int(parent), name) for pid, parent, name in (line.split(maxsplit=2) for line in shown)}
        return [pid for pid, (_, name) in rows.items() if name.startswith("ray::ExpertHost") and self._has_started(pid, rows)]

    def _has_started(self, pid: int, rows: Mapping[int, tuple[int, str]]) -> bool:
        return pid == self.pid or (pid in rows and self._has_started(rows[pid][0], rows))

    def restarts(self) -> int:
        """How often the frontend was connected to a host again."""
        with urllib.request.urlopen(self.metrics) as page:
            found = re.search(r"^moeserve_host_restarts_total (\S+)", page.read().decode(), re.MULTILINE)
        return int(float(found[1])) if found else 0


@dataclass(frozen=True)
class Call:
    """How long one took, in seconds; why it failed, "" = it did not."""

    seconds: float
    failure: str


def main() -> None:
    options = parse()
    with service(options) as running:
        print(f"{options.checkpoint.name}, {options.hosts} hosts, 2 copies, {os.cpu_count()} cores\n")
        away = [one_at_a_time(running, number % options.hosts) for number in range(options.kills)]
        print("| kills, one at a time | away, median | longest |\n|--:|--:|--:|")
        print(f"| {len(away)} | {sorted(away)[len(away) // 2]:.2f} s | {max(away):.2f} s |\n")
        report(*again_and_again(running, options))


def one_at_a_time(running: Running, number: int) -> float:
    """Seconds that a host is away."""
    victim = until(lambda: running.pids().get(f"host-{number}", 0))
    before, killed_at = running.restarts(), time.monotonic()
    os.kill(victim, signal.SIGKILL)
    until(lambda: running.restarts() > before)
    back_at = time.monotonic()
    until(lambda: running.pids().get(f"host-{number}", victim) != victim)
    return back_at - killed_at


def again_and_again(running: Running, options: argparse.Namespace) -> tuple[int, list[Call]]:
    """How many were killed, and the calls meanwhile."""
    over = threading.Event()
    with ThreadPoolExecutor(_CLIENTS) as pool:
        calling = [pool.submit(call_on, running.target, over, seed) for seed in range(_CLIENTS)]
        kills = kill_on(running, options)
        over.set()
        return kills, [call for calls in calling for call in calls.result()]


def kill_on(running: Running, options: argparse.Namespace) -> int:
    """Any process of a host, one that has not loaded yet as well."""
    kills, choice, next_at = 0, random.Random(options.seed), time.monotonic()
    end = next_at + options.seconds
    while (next_at := next_at + options.every) < end:
        time.sleep(max(0.0, next_at - time.monotonic()))
        if found := running.processes():
            os.kill(choice.choice(found), signal.SIGKILL)
            kills += 1
    return kills


def call_on(target: str, over: threading.Event, seed: int) -> list[Call]:
    """A client that calls so many times a second, until it is over."""
    generator = torch.Generator().manual_seed(seed)
    calls: list[Call] = []
    with moeserve.Client(target, timeout=_DEADLINE_S) as client:
        layers = client.layers()
        for layer in cycle(layers):
            if over.is_set():
                return calls
            hidden_states = torch.randn(_TOKENS, layer.hidden_size, generator=generator)
            began, failure = time.monotonic(), ""
            try:
                client.forward(hidden_states, layer=layer.index)
            except moeserve.MoEServeError as error:
                failure = f"{type(error).__name__}: {error}"
            seconds = time.monotonic() - began
            calls.append(Call(seconds, failure))
            over.wait(max(0.0, _CLIENTS / _CALLS_PER_S - seconds))
    return calls


def report(kills: int, calls: Sequence[Call]) -> None:
    seconds = sorted(call.seconds for call in calls)
    failures = [call.failure for call in calls if call.failure]
    print("| kills | calls | failed | p50 | p99 | longest |\n|--:|--:|--:|--:|--:|--:|")
    shown = " | ".join(f"{value:.3f} s" for value in (seconds[len(seconds) // 2], seconds[int(len(seconds) * 0.99)], seconds[-1]))
    print(f"| {kills} | {len(calls)} | {len(failures)} | {shown} |")
    for failure in dict.fromkeys(failures):
        print(f"{failures.count(failure)} x {failure}")


def until(look: Callable[[], int]) -> int:
    """What it finds, once that is not 0."""
    deadline = time.monotonic() + _LONGEST_S
    while not (found := look()):
        if time.monotonic() > deadline:
            raise SystemExit(f"nothing happened for {_LONGEST_S:g} s")
        time.sleep(_LOOK_S)
    return found


@contextmanager
def service(options: argparse.Namespace) -> Iterator[Running]:
    """`moeserve serve` in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        token_file, file = Path(folder) / "token", Path(folder) / "service.toml"
        token_file.touch(mode=0o600)
        token_file.write_text("admin-token-of-this-run")
        file.write_text(CONFIG.format(checkpoint=options.checkpoint.resolve(), hosts=options.hosts, token_file=token_file))
        command = [sys.executable, "-c", "from moeserve.cli.app import entry; entry()", "serve", str(file)]
        log = Path(folder) / "log"
        with log.open("w") as stderr:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr)
        try:
            until(lambda: process.poll() is not None or "\nready " in log.read_text())
            found = re.search(r"^metrics at (\S+)\nready (\S+)", log.read_text(), re.MULTILINE)
            if found is None:
                raise SystemExit(f"the service did not start:\n{log.read_text()}")
            yield Running(process.pid, found[2], found[1], token_file.read_text())
        finally:
            process.terminate()
            process.wait()
            if options.log is not None:
                options.log.write_text(log.read_text())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=Path(__file__).parents[1] / "examples" / "tiny-moe")
    parser.add_argument("--hosts", type=int, default=3)
    parser.add_argument("--kills", type=int, default=9, help="one at a time")
    parser.add_argument("--every", type=float, default=2.0, help="seconds between two kills")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--log", type=Path, help="where what the service said is written")
    parser.add_argument("--seed", type=int, default=1, help="which are killed")
    return parser.parse_args()


if __name__ == "__main__":
    main()
