"""Everything that moves experts at once, under load: scale, drain, swap, copies, rounds of balancing, and hosts that are killed.

`python benchmarks/bench_storm.py --help`. A service on a local Ray with two copies of every expert. Callers ask for a few experts more than
for the others, and compare every answer with the weights that it names. Exit code 1: a call failed, an answer was wrong, an expert had no
live copy, an epoch went back, or experts still moved under a steady load at the end.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import moeserve
from moeserve import Client, MoELayer, MoEServeError
from moeserve.client import AdminClient

TINY = Path(__file__).parents[1] / "examples" / "tiny-moe"
LAYERS, EXPERTS, HIDDEN, TOKENS, CLIENTS = 4, 8, 128, 128, 4
FEWEST_HOSTS, MOST_HOSTS = 3, 5


@dataclass
class Log:
    """What was seen."""

    answered: int = 0
    wrongs: list[str] = field(default_factory=list)
    events: Counter[str] = field(default_factory=Counter)
    longest_s: float = 0.0
    epochs: list[int] = field(default_factory=lambda: [0])


def configuration(folder: Path, checkpoint: Path) -> dict[str, object]:
    (folder / "admin").touch(0o600)
    (folder / "admin").write_text("of-the-administrator")
    return {
        "model": {"checkpoint": checkpoint, "dtype": "float32"},
        "placement": {"num_hosts": FEWEST_HOSTS, "cpus_per_host": 0.1, "copies": 2},
        "server": {"port": 0, "metrics_port": 0, "admin_token_file": folder / "admin", "drain_timeout_s": 5.0},
        "balancing": {"enabled": True, "extra_copies": 1.5, "min_copies": 2, "window_s": 9.0, "interval_s": 1.0, "min_gain": 0.1},
    }


def other_weights(folder: Path) -> Path:
    """The same model with other experts."""
    folder.mkdir()
    for file in TINY.iterdir():
        if file.suffix == ".json":
            (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(TINY / "model.safetensors")
    save_file({name: -tensor if ".experts." in name else tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


class Callers:
    """They ask a few experts for most of the rows, until told to stop."""

    def __init__(self, target: str, folders: Sequence[Path], log: Log) -> None:
        self._target, self._log, self._stop = target, log, threading.Event()
        self._layers = [[MoELayer.from_checkpoint(path, layer, dtype=torch.float32) for layer in range(LAYERS)] for path in folders]

    @contextmanager
    def calling(self) -> Iterator[None]:
        with ThreadPoolExecutor(CLIENTS + 1) as pool:
            running = [pool.submit(self._call, number) for number in range(CLIENTS)] + [pool.submit(self._watch)]
            try:
                yield
            finally:
                self._stop.set()
                for each in running:
                    each.result()

    def _call(self, number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        share = torch.arange(1, EXPERTS + 1) ** -1.2
        with Client(self._target, timeout=15, retry=False) as client:
            while not self._stop.is_set():
                layer = int(torch.randint(LAYERS, (1,), generator=generator))
                rows = torch.randn(TOKENS, HIDDEN, generator=generator)
                ids = torch.multinomial(share.expand(TOKENS, EXPERTS), 2, generator=generator)
                began = time.monotonic()
                try:
                    answer = client.forward(rows, layer=layer, topk_ids=ids, topk_weights=torch.full((TOKENS, 2), 0.5))
                except MoEServeError as error:
                    self._log.wrongs.append(f"a call failed: {error}")
                    continue
                self._log.longest_s = max(self._log.longest_s, time.monotonic() - began)
                weights = self._layers[(answer.model_revision - 1) % len(self._layers)][layer]
                expected = weights.run(rows, topk_ids=ids, topk_weights=torch.full((TOKENS, 2), 0.5)).hidden_states
                if not torch.allclose(answer.hidden_states, expected, rtol=1e-3, atol=1e-4):
                    self._log.wrongs.append(f"an answer of revision {answer.model_revision} was wrong")
                self._log.answered += 1

    def _watch(self) -> None:
        with Client(self._target) as client:
            while not self._stop.wait(0.05):
                stats = client.stats()
                self._log.epochs.append(stats.epoch)
                if self._log.epochs[-1] < self._log.epochs[-2]:
                    self._log.wrongs.append(f"epoch {self._log.epochs[-2]} was followed by {self._log.epochs[-1]}")
                for layer in stats.layers:
                    if not all(layer.live_copies):
                        self._log.wrongs.append(f"{layer.name}: an expert had no live copy in epoch {stats.epoch}")


class Storm:
    """One event after the other, at random."""

    def __init__(self, admin: AdminClient, folders: Sequence[Path], log: Log, seed: int) -> None:
        self._admin, self._folders, self._log, self._random = admin, folders, log, random.Random(seed)
        self._swaps = 0

    def run(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        ways = {"scale": self._scale, "drain": self._drain, "swap": self._swap, "copies": self._copies, "rebalance": self._rebalance}
        while time.monotonic() < end:
            name, way = self._random.choice([*ways.items(), ("kill", self._kill)])
            try:
                way()
                self._log.events[name] += 1
            except MoEServeError as error:
                self._log.events[f"{name}: {type(error).__name__}"] += 1
            time.sleep(self._random.uniform(0, 0.5))

    def _scale(self) -> None:
        self._admin.scale(self._random.randint(FEWEST_HOSTS, MOST_HOSTS))

    def _drain(self) -> None:
        hosts = self._admin.status().hosts
        if len(hosts) > FEWEST_HOSTS:
            self._admin.drain(self._random.choice(hosts).name)

    def _swap(self) -> None:
        self._admin.swap("", self._folders[(self._swaps + 1) % len(self._folders)])
        self._swaps += 1

    def _copies(self) -> None:
        layer = self._random.choice(self._admin.status().layers).name
        self._admin.scale_copies(self._random.randint(2, 3), layer, self._random.randrange(EXPERTS))

    def _rebalance(self) -> None:
        self._admin.rebalance()

    def _kill(self) -> None:
        """Only while all are up: there are two copies."""
        hosts = self._admin.status().hosts
        if all(host.is_up for host in hosts):
            os.kill(self._random.choice(hosts).pid, signal.SIGKILL)
            until_up(self._admin)


def until_up(admin: AdminClient) -> None:
    while not all(host.is_up for host in admin.status().hosts):
        time.sleep(0.05)


def main() -> None:
    options = parse()
    log = Log()
    with tempfile.TemporaryDirectory() as name:
        storm(Path(name), options, log)
    print(f"{options.seconds:g} s, seed {options.seed}: {', '.join(f'{what} {count}' for what, count in sorted(log.events.items()))}")
    print(f"{log.answered} calls answered, the longest took {1000 * log.longest_s:.0f} ms; {log.epochs[-1]} epochs")
    for what, count in Counter(log.wrongs).items():
        print(f"WRONG: {count} x {what}")
    if not log.wrongs:
        print("nothing is wrong")
    raise SystemExit(bool(log.wrongs))


def storm(folder: Path, options: argparse.Namespace, log: Log) -> None:
    """Then calm: experts may still move for a while, and then must not, because the load stays the same."""
    folders = [TINY, other_weights(folder / "other")]
    with (
        moeserve.serve(configuration(folder, TINY)) as service,
        AdminClient(service.target, "of-the-administrator") as admin,
        Callers(service.target, folders, log).calling(),
    ):
        Storm(admin, folders, log, options.seed).run(options.seconds)
        until_up(admin)
        time.sleep(options.calm)
        calm = admin.status().epoch
        time.sleep(options.calm)
        if (epoch := admin.status().epoch) != calm:
            log.wrongs.append(f"experts still moved under a steady load: epoch {calm} was followed by {epoch}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--calm", type=float, default=10, help="seconds for which experts may still move afterwards, and then must not")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
