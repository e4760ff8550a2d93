"""Weights of training steps, swapped in under load: python benchmarks/bench_swaps.py [--experts 4].

One layer of a Mixtral, bfloat16: 16 experts of hidden size 2048 and intermediate size 1408, 2 for each token; two hosts that are threads.
A step multiplies `down_proj` of the first `--experts` by 1, 2 or 4, which is exact, so every answer tells which weights computed it.

T = 16 tokens of a call, H hidden size, I intermediate size, E experts, K choices per token.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from running import served
from safetensors.torch import save_file

import moeserve
from moeserve.client import AdminClient

LAYER, SAVED = "model.layers.0.mlp", "model.layers.0.block_sparse_moe"
TOKENS, HIDDEN, INTERMEDIATE, EXPERTS, CALLERS = 16, 2048, 1408, 16, 2
FACTORS = (1.0, 2.0, 4.0)
#: swaps without callers
ALONE = 10
TOKEN = "of-the-administrator"
MODEL = {
    "model_type": "mixtral",
    "num_hidden_layers": 1,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "hidden_act": "silu",
}
CONFIG = """
[model]
checkpoint = "{folder}/base"
[placement]
num_hosts = 2
[server]
port = 0
metrics_port = 0
admin_token_file = "{folder}/admin"
"""


@dataclass
class Calls:
    """What callers saw: durations, and how many answers failed or were not those of their revision's weights alone."""

    seconds: list[float] = field(default_factory=list)
    failed: int = 0
    wrong: int = 0
    revisions: set[int] = field(default_factory=set)

    def __str__(self) -> str:
        found = sorted(self.seconds)
        p50, p99 = (1000 * found[int(share * (len(found) - 1))] for share in (0.5, 0.99))
        return f"{len(found)} | {self.failed} | {self.wrong} | {p50:.0f} | {p99:.0f} | {1000 * found[-1]:.0f}"


class Steps:
    """A trainer's weights in memory, and the folders that it writes."""

    def __init__(self, folder: Path, num_changed: int) -> None:
        generator = torch.Generator().manual_seed(0)
        shapes = {"w1": (INTERMEDIATE, HIDDEN), "w3": (INTERMEDIATE, HIDDEN), "w2": (HIDDEN, INTERMEDIATE)}
        self.folder, self.changed = folder, list(range(num_changed))
        self.weights = {f"{SAVED}.gate.weight": torch.randn(EXPERTS, HIDDEN, generator=generator).bfloat16()} | {
            f"{SAVED}.experts.{expert}.{name}.weight": (0.02 * torch.randn(shape, generator=generator)).bfloat16()
            for expert in range(EXPERTS)
            for name, shape in shapes.items()
        }
        (folder / "base").mkdir()
        (folder / "base" / "config.json").write_text(json.dumps(MODEL))
        save_file(self.weights, folder / "base" / "model.safetensors")

    @property
    def gib(self) -> float:
        """Of the experts of a step."""
        return len(self.changed) * 3 * HIDDEN * INTERMEDIATE * 2 / 2**30

    def write(self, step: int) -> Path:
        """The changed experts in a file of their own, beside a link to the others."""
        path = self.folder / f"step-{step}"
        path.mkdir()
        for name in ("config.json", "model.safetensors"):
            (path / name).symlink_to(self.folder / "base" / name)
        names = [name for name in self.weights for expert in self.changed if f".experts.{expert}." in name]
        factor = FACTORS[step % 3]
        save_file({name: self.weights[name] * (factor if ".w2." in name else 1) for name in names}, path / "step.safetensors")
        files = dict.fromkeys(self.weights, "model.safetensors") | dict.fromkeys(names, "step.safetensors")
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
        return path


class Checked:
    """Rows, and what the experts of revision 1 make of them: those that never change, and the others."""

    def __init__(self, steps: Steps) -> None:
        layer = moeserve.MoELayer.from_checkpoint(steps.folder / "base", layer=0)
        self.rows = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1))
        routed = layer.run(self.rows, return_routing=True)
        assert routed.topk_ids is not None and routed.topk_weights is not None
        is_changed = routed.topk_ids < len(steps.changed)
        self.kept, self.changed = (
            layer.run(self.rows, topk_ids=routed.topk_ids.masked_fill(others, -1), topk_weights=routed.topk_weights).hidden_states
            for others in (is_changed, ~is_changed)
        )

    def is_right(self, answer: moeserve.ForwardOutput) -> bool:
        expected = self.kept + FACTORS[(answer.model_revision - 1) % 3] * self.changed
        return torch.allclose(answer.hidden_states, expected, rtol=1e-2, atol=1e-3 * float(expected.abs().max()))


def call(client: moeserve.Client, checked: Checked, stop: threading.Event) -> Calls:
    """One call after another until it is told to stop."""
    found = Calls()
    while not stop.is_set():
        began = time.perf_counter()
        try:
            answer = client.forward(checked.rows)
        except moeserve.MoEServeError as error:
            print(error, flush=True)
            found.failed += 1
        else:
            found.wrong += not checked.is_right(answer)
            found.revisions.add(answer.model_revision)
        found.seconds.append(time.perf_counter() - began)
    return found


@dataclass
class Durations:
    """Seconds to write and to swap each step of `gib` GiB, and of processors of the service meanwhile."""

    gib: float
    writing: list[float] = field(default_factory=list)
    swapping: list[float] = field(default_factory=list)
    processors_s: float = 0.0

    def __str__(self) -> str:
        figures = (median(self.writing), median(self.swapping), max(self.swapping), self.processors_s / len(self.swapping))
        return " | ".join(f"{seconds / self.gib:.2f}" for seconds in figures)


@contextmanager
def loaded(client: moeserve.Client, checked: Checked) -> Iterator[Calls]:
    """Callers beside what happens within; what they saw is complete at the end."""
    stop, seen = threading.Event(), Calls()
    with ThreadPoolExecutor(CALLERS) as pool:
        running = [pool.submit(call, client, checked, stop) for _ in range(CALLERS)]
        try:
            yield seen
        finally:
            stop.set()
        for one in (each.result() for each in running):
            seen.seconds += one.seconds
            seen.failed += one.failed
            seen.wrong += one.wrong
            seen.revisions |= one.revisions


def swapped(admin: AdminClient, steps: Steps, numbers: range, pid: int) -> Durations:
    """These steps, one after the other; the folder of the one before is removed."""
    found, before = Durations(steps.gib), processors_s(pid)
    for step in numbers:
        began = time.perf_counter()
        path = steps.write(step)
        written = time.perf_counter()
        done = admin.swap(LAYER, path, steps.changed)
        found.swapping.append(time.perf_counter() - written)
        found.writing.append(written - began)
        assert done.model_revision == step + 1
        shutil.rmtree(steps.folder / f"step-{step - 1}", ignore_errors=True)
    found.processors_s = processors_s(pid) - before
    return found


def processors_s(pid: int) -> float:
    """What a process has used of all processors, in seconds; hosts that are threads are part of it."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def compare(target: str, pid: int, steps: Steps, swaps: int) -> None:
    """Two tables: of swaps beside callers and alone, and of the calls beside them."""
    checked = Checked(steps)
    with moeserve.Client(target) as client, AdminClient(target, TOKEN) as admin:
        alone = swapped(admin, steps, range(1, ALONE + 1), pid)
        with loaded(client, checked) as quiet:
            time.sleep(5)
        with loaded(client, checked) as busy:
            beside = swapped(admin, steps, range(ALONE + 1, ALONE + swaps + 1), pid)
    print("| swaps | callers | write s/GiB | swap s/GiB | longest swap s/GiB | processors s/GiB |\n|--:|--:|--:|--:|--:|--:|")
    print(f"| {ALONE} | 0 | {alone} |\n| {swaps} | {CALLERS} | {beside} |")
    print("\n| | calls | failed | not of one revision | p50 ms | p99 ms | longest ms |\n|---|--:|--:|--:|--:|--:|--:|")
    print(f"| before | {quiet} |\n| during {swaps} swaps | {busy} |")
    print(f"\nrevisions seen in answers: {len(busy.revisions)} of {swaps + 1}")


def main() -> None:
    """Print two tables in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--swaps", type=int, default=50)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        folder = Path(name)
        steps = Steps(folder, arguments.experts)
        (folder / "admin").touch(0o600)
        (folder / "admin").write_text(TOKEN)
        (folder / "service.toml").write_text(CONFIG.format(folder=folder))
        with served(folder / "service.toml", "threads") as (target, pid, _):
            compare(target, pid, steps, arguments.swaps)


if __name__ == "__main__":
    main()
