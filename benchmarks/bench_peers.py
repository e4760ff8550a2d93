"""moeserve beside what else serves experts, turn by turn on the same cores: hivemind, Ray Serve, Ray actors, transformers' own block.

`make bench-peers`, which makes the peers' environments, or `python benchmarks/bench_peers.py --help`. Every peer is a process of its own,
with the versions of `peers/*.txt`; all are up all the time, and one side runs at a time, for a moment, in turn. 8 experts of 512 x 2048,
float32, 2 for each token, random weights. Two tables, for two kinds of experts: hivemind's have no gate (gelu), transformers' do (swiglu);
--plot draws both.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

from bench_precision import cpu_model
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from running import served

PEERS = Path(__file__).with_name("peers")
CONFIG = """
[placement]
num_hosts = 2
cpus_per_host = 1.0
[server]
port = 0
metrics_port = 0
"""
LAYER = """
[[layers]]
name = "{activation}"
hidden_size = 512
intermediate_size = 2048
num_experts = 8
activation = "{activation}"
gating.top_k = 2
"""
#: one side asks expert by expert for each row, which takes minutes for a thousand
MOST_TOKENS = {"hivemind, RemoteMixtureOfExperts": 64}


class Peer:
    """A process that has sides, and runs one when told to."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        told = self._read()
        self.sides: list[str] = told["sides"]
        self.versions: str = told["versions"]

    def turn(self, side: str, tokens: int, seconds: float) -> list[float]:
        """Seconds of each call."""
        assert self._process.stdin is not None
        print(json.dumps([side, tokens, seconds]), file=self._process.stdin, flush=True)
        taken: list[float] = self._read()
        return taken

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{' '.join(map(str, self._process.args))} has ended")  # type: ignore[arg-type]
        return json.loads(line)


def main() -> None:
    options = parse()
    print(f"{date.today()}, {cpu_model()}, {os.cpu_count()} cores")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        config = folder / "service.toml"
        config.write_text("".join(LAYER.format(activation=activation) for activation in ("gelu", "swiglu")) + CONFIG)
        target, _, _ = stack.enter_context(served(config))
        tables: dict[str, dict[str, dict[int, float]]] = {}
        for activation, others in (("gelu", [("of_hivemind.py", options.hivemind)]), ("swiglu", [("of_ray.py", options.ray)])):
            with ExitStack() as table:
                peers = [table.enter_context(peer(sys.executable, "of_moeserve.py", target, activation))]
                peers += [table.enter_context(peer(python, script)) for script, python in others if python]
                print(f"\n### {activation}\n\n" + "; ".join(each.versions for each in peers) + "\n")
                tables[activation] = measured(peers, options)
                for line in rows(tables[activation], options.tokens):
                    print(line, flush=True)
    if options.plot:
        draw(tables, options.tokens, options.plot)


def measured(peers: Sequence[Peer], options: argparse.Namespace) -> dict[str, dict[int, float]]:
    """Milliseconds of a call of each side, by T: the median over all its turns."""
    taken: dict[tuple[str, int], list[float]] = {}
    for tokens in options.tokens:
        for _ in range(options.rounds):
            for each in peers:
                for side in each.sides:
                    if tokens <= MOST_TOKENS.get(side, tokens):
                        taken.setdefault((side, tokens), []).extend(each.turn(side, tokens, options.turn_s))
    found: dict[str, dict[int, float]] = {side: {} for each in peers for side in each.sides}
    for (side, tokens), seconds in taken.items():
        found[side][tokens] = 1e3 * median(seconds)
    return found


def rows(found: dict[str, dict[int, float]], sizes: Sequence[int]) -> Iterator[str]:
    """Lines of Markdown: milliseconds, and how many times as long as the first side, the service over gRPC."""
    yield "| | " + " | ".join(f"T = {tokens}, ms | / gRPC" for tokens in sizes) + " |"
    yield "|---|" + "--:|--:|" * len(sizes)
    first = next(iter(found.values()))
    for side, by_tokens in found.items():
        cells = [f"{by_tokens[size]:.2f} | {by_tokens[size] / first[size]:.2f}" if size in by_tokens else "– | –" for size in sizes]
        yield f"| {side} | " + " | ".join(cells) + " |"


def draw(tables: dict[str, dict[str, dict[int, float]]], sizes: Sequence[int], path: Path) -> None:
    """A PNG: how many times as long as the service over gRPC each side takes for a call."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    for axes, (activation, found) in zip(figure.subplots(1, len(tables)), tables.items(), strict=True):
        first, sides = next(iter(found.values())), list(found)
        for number, size in enumerate(sizes):
            places = [row + 0.25 * number for row, side in enumerate(sides) if size in found[side]]
            ratios = [found[side][size] / first[size] for side in sides if size in found[side]]
            axes.bar_label(axes.barh(places, ratios, height=0.22, label=f"T = {size}"), fmt=" %.2f", fontsize=7)
        axes.set(xscale="log", xlabel="time of a call / moeserve over gRPC", title=f"{activation} experts")
        axes.set_yticks([row + 0.25 for row in range(len(sides))], sides)
        axes.axvline(1, color="gray", linewidth=0.8)
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(sizes))
    figure.savefig(path, dpi=120)


@contextmanager
def peer(python: str, script: str, *arguments: str) -> Iterator[Peer]:
    """What it writes to stderr goes to a file that is shown when it ends early."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(PEERS), os.environ.get("PYTHONPATH", "")))}
    with tempfile.TemporaryFile("w+") as log:
        command = [python, str(PEERS / script), *arguments]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log, "text": True, "env": environment}
        with subprocess.Popen(command, **pipes) as process:  # type: ignore[call-overload]
            try:
                yield Peer(process)
            except SystemExit:
                log.seek(0)
                print(log.read()[-4000:], file=sys.stderr)
                raise
            finally:
                process.stdin.close()
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    process.terminate()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hivemind", metavar="PYTHON", help="of an environment with peers/hivemind.txt")
    parser.add_argument("--ray", metavar="PYTHON", help="of an environment with peers/ray.txt")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 64, 1024])
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side")
    parser.add_argument("--turn-s", type=float, default=0.5, help="seconds of a turn")
    parser.add_argument("--plot", type=Path, metavar="PNG")
    return parser.parse_args()


if __name__ == "__main__":
    main()
