"""What benchmarks share: a service and a correct client in processes of their own, and what Linux says of them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HIDDEN, INTERMEDIATE, EXPERTS, LAYERS = 64, 64, 8, 2
SERVICE = """
[placement]
num_hosts = 2
copies = 2
[server]
port = 0
metrics_port = 0
admin_token_file = "{folder}/admin"
max_message_bytes = 16777216
[controller]
frontend_token_file = "{folder}/follow"
"""
TOKENS = {"admin": "of-the-administrator", "follow": "of-a-frontend"}
LAYER = """
[[layers]]
hidden_size = {hidden}
intermediate_size = {intermediate}
num_experts = {experts}
seed = {seed}
"""
#: asks for what it knows the answer to until it is told to stop, and says how that went
CORRECT = """
import json, sys, time
import torch
import moeserve
target, hidden, intermediate, experts, layers, between_calls_s = json.loads(sys.argv[1])
sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_experts": experts}
layer_of = [moeserve.MoELayer(**sizes, seed=seed) for seed in range(layers)]
client, wrong, failed, seconds = moeserve.Client(target, timeout=30), 0, {}, []
with open(sys.argv[2]) as stop:
    while True:
        number = len(seconds)
        rows = torch.randn(1 + number % 40, hidden, generator=torch.Generator().manual_seed(number))
        began = time.monotonic()
        try:
            answer = client.forward(rows, layer=number % layers).hidden_states
            wrong += not torch.allclose(answer, layer_of[number % layers](rows), rtol=1e-3, atol=1e-4)
        except moeserve.MoEServeError as error:
            failed[str(error)[:100]] = failed.get(str(error)[:100], 0) + 1
        seconds.append(time.monotonic() - began)
        if number == 0:
            print("begun", flush=True)
        stop.seek(0)
        if stop.read():
            break
        time.sleep(between_calls_s)
print(json.dumps([wrong, failed, seconds]))
"""


@dataclass(frozen=True)
class Seen:
    """A process as Linux shows it."""

    resident_mib: float
    descriptors: int
    threads: int


@dataclass(frozen=True)
class Running:
    """`processes`: the service and its hosts, by name."""

    target: str
    metrics: str
    processes: dict[str, int]
    log: Path

    def seen(self) -> dict[str, Seen]:
        return {name: _seen(pid) for name, pid in self.processes.items()}

    def gauges(self) -> dict[str, float]:
        """What is under way: nothing, once nobody calls."""
        with urllib.request.urlopen(self.metrics, timeout=30) as page:
            lines = re.findall(r"^(moeserve_(?:host_)?queue_\w+(?:{.*})?) (\S+)$", page.read().decode(), re.MULTILINE)
        return {name: float(value) for name, value in lines}


@contextmanager
def service(folder: Path, cluster: str) -> Iterator[Running]:
    """`moeserve serve` with hosts of `cluster`, ray or threads."""
    for name, token in TOKENS.items():
        (folder / name).touch(0o600)
        (folder / name).write_text(token)
    sizes = {"hidden": HIDDEN, "intermediate": INTERMEDIATE, "experts": EXPERTS}
    layers = "".join(LAYER.format(seed=seed, **sizes) for seed in range(LAYERS))
    (folder / "service.toml").write_text(layers + SERVICE.format(folder=folder))
    with served(folder / "service.toml", cluster) as (target, pid, log):
        said = log.read_text()
        metrics = re.search(r"^metrics at (\S+)", said, re.MULTILINE)
        assert metrics is not None
        hosts = {name: int(number) for name, number in re.findall(r"^(host-\d+) ready .* pid (\d+) ", said, re.MULTILINE)}
        of_their_own = {name: number for name, number in hosts.items() if number != pid}
        yield Running(target, metrics[1], {"service": pid, **of_their_own}, log)


@contextmanager
def served(config: Path, cluster: str = "ray") -> Iterator[tuple[str, int, Path]]:
    """`moeserve serve CONFIG` in a process of its own: its host:port, its number, and its log, which is beside the file."""
    log = config.with_suffix(".log")
    command = [sys.executable, "-m", "moeserve", "serve", str(config), "--cluster", cluster]
    with log.open("w") as stderr, subprocess.Popen(command, stderr=stderr) as process:
        try:
            while (ready := re.search(r"^ready (\S+)", log.read_text(), re.MULTILINE)) is None:
                try:
                    raise SystemExit(f"the service exited with {process.wait(0.2)}:\n{log.read_text()}")
                except subprocess.TimeoutExpired:
                    continue
            yield ready[1], process.pid, log
        finally:
            process.terminate()


@dataclass
class Correct:
    """How the correct client fared: answers that were wrong, calls that failed, and why, seconds of each call."""

    wrong: int
    failed: dict[str, int]
    seconds: list[float]

    def quantile_ms(self, share: float) -> float:
        return 1000 * sorted(self.seconds)[min(len(self.seconds) - 1, int(share * len(self.seconds)))]

    def __str__(self) -> str:
        p50, p99, most = (self.quantile_ms(share) for share in (0.5, 0.99, 1))
        return f"{len(self.seconds)} | {self.wrong} | {sum(self.failed.values())} | {p50:.1f} | {p99:.1f} | {most:.0f}"


@contextmanager
def correct_client(running: Running, folder: Path, between_calls_s: float = 0) -> Iterator[list[Correct]]:
    """Beside what happens within; the list has the one result at the end."""
    stop = folder / "stop"
    stop.write_text("")
    arguments = json.dumps([running.target, HIDDEN, INTERMEDIATE, EXPERTS, LAYERS, between_calls_s])
    found: list[Correct] = []
    with subprocess.Popen([sys.executable, "-c", CORRECT, arguments, str(stop)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            process.stdout.readline()
            yield found
        finally:
            stop.write_text("stop")
            found.append(Correct(*json.loads(process.stdout.readline())))


def table(before: dict[str, Seen], after: dict[str, Seen]) -> Sequence[str]:
    """Lines of Markdown."""
    lines = ["| process | MiB before, after | descriptors | threads |", "|---|--:|--:|--:|"]
    for name, was in before.items():
        now = after[name]
        memory = f"{was.resident_mib:.0f}, {now.resident_mib:.0f}"
        lines.append(f"| {name} | {memory} | {was.descriptors}, {now.descriptors} | {was.threads}, {now.threads} |")
    return lines


def _seen(pid: int) -> Seen:
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return Seen(int(status["VmRSS"].split()[0]) / 1024, len(list(Path(f"/proc/{pid}/fd").iterdir())), int(status["Threads"]))
