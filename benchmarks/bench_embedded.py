"""A frontend in the caller's process against calls over gRPC and the model in one process: python benchmarks/bench_embedded.py.

All sides ask one `moeserve serve` of examples/tiny-moe in another process, with two hosts; they take turns, and medians are reported.
T tokens of a call; the layer's 8 experts have hidden size 128 and intermediate size 256, 2 for each token.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from running import served
from transformers import AutoModelForCausalLM, AutoTokenizer

import moeserve

TINY = Path(__file__).parent.parent / "examples" / "tiny-moe"
TOKENS = (1, 16, 64, 1024)
PAUSES_MS = (0.0, 1.0)
_BURST = 20
PROMPT = "The import statement"
CONFIG = """
[model]
checkpoint = "{checkpoint}"
dtype = "float32"
[placement]
num_hosts = 2
[server]
port = 0
metrics_port = 0
"""


def seconds(call: Callable[[], object], times: int, pause_s: float) -> list[float]:
    """Of each call; before it, a pause in which caches cool and threads go to sleep."""
    found = []
    for _ in range(times):
        if pause_s:
            time.sleep(pause_s)
        began = time.perf_counter()
        call()
        found.append(time.perf_counter() - began)
    return found


def in_turns(sides: dict[str, Callable[[], object]], rounds: int, times: int, pause_s: float = 0.0) -> dict[str, list[float]]:
    """Seconds of each call of each side, in bursts that take turns; a burst before is not counted."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(rounds + 1):
        for name, call in sides.items():
            burst = seconds(call, times, pause_s)
            found[name] += burst if round_ else []
    return found


def calls(near: Any, far: Any, rounds: int) -> Sequence[str]:
    """Rows of the table of calls."""
    layer = moeserve.MoELayer.from_checkpoint(TINY, layer=0, dtype=torch.float32)
    lines = []
    for num_tokens in TOKENS:
        rows = torch.randn(num_tokens, layer.spec.hidden_size)
        sides: dict[str, Callable[[], object]] = {
            "layer": partial(layer.run, rows),
            "embedded": partial(near.forward, rows),
            "grpc": partial(far.forward, rows),
        }
        for pause_ms in PAUSES_MS:
            found = {name: 1000 * median(times) for name, times in in_turns(sides, rounds, _BURST, pause_ms / 1000).items()}
            ratio = found["embedded"] / found["grpc"]
            figures = " | ".join(f"{found[name]:.2f}" for name in sides)
            lines.append(f"| {num_tokens} | {pause_ms:g} | {figures} | **{ratio:.2f}** |")
            print(lines[-1], flush=True)
    return lines


def generation(target: str, near: Any, far: Any, rounds: int, new_tokens: int) -> str:
    """A row: tokens/s of a greedy generation with the experts here, and there by both ways."""
    models: dict[str, Any] = {
        "one process": AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32),
        "embedded": moeserve.load_model(TINY, near, dtype=torch.float32),
        "grpc": moeserve.load_model(TINY, far, dtype=torch.float32),
    }
    prompt = AutoTokenizer.from_pretrained(TINY)(PROMPT, return_tensors="pt")
    texts: dict[str, torch.Tensor] = {}

    def generate(name: str) -> None:
        with torch.no_grad():
            texts[name] = models[name].generate(**prompt, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)

    sides: dict[str, Callable[[], object]] = {name: partial(generate, name) for name in models}
    found = in_turns(sides, rounds, 1)
    assert all(torch.equal(text, texts["one process"]) for text in texts.values()), "other tokens"
    rates = {name: new_tokens / median(times) for name, times in found.items()}
    shares = [rates[name] / rates["one process"] for name in ("embedded", "grpc")]
    return f"| {' | '.join(f'{rate:.1f}' for rate in rates.values())} | **{shares[0]:.2f}** | {shares[1]:.2f} |"


def main() -> None:
    """Print two tables in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cluster", choices=("ray", "threads"), default="ray")
    parser.add_argument("--target", help="a service that runs already, instead of one of its own")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.target is not None:
        compare(arguments.target, arguments.rounds, arguments.new_tokens)
        return
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "service.toml"
        config.write_text(CONFIG.format(checkpoint=TINY))
        with served(config, arguments.cluster) as (target, _, _):
            compare(target, arguments.rounds, arguments.new_tokens)


def compare(target: str, rounds: int, new_tokens: int) -> None:
    """Both tables, of the service at `target`."""
    with moeserve.EmbeddedClient(target) as near, moeserve.Client(target) as far:
        print("| T | pause ms | in process ms | embedded ms | gRPC ms | embedded / gRPC |\n|--:|--:|--:|--:|--:|--:|")
        calls(near, far, rounds)
        print("\n| one process tokens/s | embedded | gRPC | embedded / one process | gRPC / one process |\n|--:|--:|--:|--:|--:|")
        print(generation(target, near, far, rounds, new_tokens))


if __name__ == "__main__":
    main()
