"""A trained MoE model on one machine, with its experts on four Ray hosts, called over gRPC.

Run it with `make demo`. The exit code is 0 only if every comparison holds.
"""

from __future__ import annotations

import http.client
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Ray starts processes while gRPC runs here. None of them uses this process's gRPC, so its warnings about forks are not needed.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

import torch
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

import moeserve
from moeserve.client import connect_experts, load_model

CHECKPOINT = Path(__file__).parent / "tiny-moe"
PROMPT = "def __init__(self, other)"
NEW_TOKENS = 64
BLOCKS = " ▁▂▃▄▅▆▇█"

console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
failures: list[str] = []


def main() -> int:
    started = time.perf_counter()
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    local = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    inputs = tokenizer(PROMPT, return_tensors="pt")

    headline("1. Start four expert hosts, each pinned to a (logical) GPU")
    with start_service() as service, moeserve.Client(service.target) as client:
        show_hosts(service)
        headline("2. Generate text, with every MoE layer computed over gRPC")
        remote = load_model(CHECKPOINT, client, dtype=torch.float32)
        sequence = generate_and_compare(tokenizer, local, remote, inputs)
        headline("3. Tokens per expert")
        show_load(client)
        headline("4. Compare the service's gate with the model's, on the same hidden states")
        compare_gates(client, local, sequence)
        headline("5. Latency of one Forward")
        show_latency(client)
    headline("6. Limit every expert to its even share: capacity_factor = 1.0")
    with start_service(capacity_factor=1.0) as service, moeserve.Client(service.target) as client:
        connect_experts(remote, client)
        show_drops(service, client, remote, sequence)

    console.print()
    console.print(f"[bold {'red' if failures else 'green'}]{'FAILED: ' + '; '.join(failures) if failures else 'All comparisons hold.'}[/]")
    console.print(f"{time.perf_counter() - started:.0f} s in total")
    return 1 if failures else 0


def start_service(**gating: Any) -> moeserve.BackgroundService:
    config = {
        "model": {"checkpoint": CHECKPOINT, "dtype": "float32"},
        "layers": {"gating": gating},
        "placement": {"num_hosts": 4, "gpus_per_host": 1, "cpus_per_host": 0.5},
        "ray": {"num_gpus": 4},
        "server": {"port": 0, "metrics_port": 0},
    }
    started = time.perf_counter()

    def progress(line: str) -> None:
        console.print(f"  [dim]{time.perf_counter() - started:5.1f} s[/]  {line}")

    return moeserve.serve(config, progress)


def show_hosts(service: moeserve.BackgroundService) -> None:
    with moeserve.Client(service.target) as client:
        stats, layers = client.stats(), client.layers()
    table = Table("host", "device", "CUDA_VISIBLE_DEVICES", "weights")
    for host in stats.hosts:
        table.add_row(host.name, host.device, host.cuda_visible_devices, f"{host.weights_bytes / 2**20:.1f} MiB")
    console.print(table)
    console.print(f"gRPC at {service.target}, metrics at {service.metrics_target}, {len(layers)} layers x {layers[0].num_experts} experts")
    pinned = [host.cuda_visible_devices for host in stats.hosts]
    check(len(set(pinned)) == len(pinned) and "" not in pinned, "every host has its own GPU")


def generate_and_compare(tokenizer: Any, local: Any, remote: Any, inputs: Any) -> torch.Tensor:
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    started = time.perf_counter()
    served = remote.generate(**inputs, **options)
    elapsed = time.perf_counter() - started
    alone = local.generate(**inputs, **options)
    text = tokenizer.decode(served.sequences[0])
    console.print(f"[bold]{text[: len(PROMPT)]}[/][cyan]{text[len(PROMPT) :]}[/]", markup=True)
    new_tokens = served.sequences.shape[1] - inputs["input_ids"].shape[1]
    console.print(f"{new_tokens} tokens in {elapsed:.2f} s: {new_tokens / elapsed:.1f} tokens/s")
    check(torch.equal(served.sequences, alone.sequences), "the tokens equal those of the model in one process")
    difference = max(float((a - b).norm() / b.norm()) for a, b in zip(served.logits, alone.logits, strict=True))
    # Sums in another order round differently: 4 layers, each a sum of at most 8 hidden sizes of numbers.
    bound = 4 * 8 * local.config.hidden_size * torch.finfo(torch.float32).eps
    check(difference < bound, f"so do the logits: largest relative difference {difference:.1e}")
    sequence: torch.Tensor = served.sequences
    return sequence


def show_load(client: moeserve.Client) -> None:
    for layer in client.stats().layers:
        counts = layer.processed.tolist()
        bars = "  ".join(f"{bar(count / max(counts))} {count:4d}" for count in counts)
        console.print(f"{layer.name:20} {bars}   dropped {int(layer.dropped.sum())}")


def compare_gates(client: moeserve.Client, local: Any, sequence: torch.Tensor) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def record(module: Any, arguments: Sequence[torch.Tensor]) -> None:
        seen.append((arguments[0], arguments[1]))

    hooks = [layer.mlp.experts.register_forward_pre_hook(record) for layer in local.model.layers]
    with torch.no_grad():
        local(sequence)
    for hook in hooks:
        hook.remove()
    same = total = 0
    for layer, (hidden_states, topk_ids) in enumerate(seen):
        answer = client.forward(hidden_states.reshape(-1, hidden_states.shape[-1]), layer=layer, return_routing=True)
        assert answer.topk_ids is not None
        same += int((answer.topk_ids.sort().values == topk_ids.sort().values).all(dim=1).sum())
        total += len(topk_ids)
    check(same == total, f"the gates choose the same experts for {same} of {total} (token, layer) pairs")


def show_latency(client: moeserve.Client) -> None:
    hidden_size = client.layers()[0].hidden_size
    for tokens in (1, 64):
        hidden_states, times_ms = torch.randn(tokens, hidden_size), []
        for _ in range(200):
            started = time.perf_counter()
            client.forward(hidden_states, layer=0)
            times_ms.append((time.perf_counter() - started) * 1000)
        times_ms.sort()
        console.print(f"{tokens:3d} tokens: p50 {times_ms[100]:.2f} ms, p99 {times_ms[197]:.2f} ms")


def show_drops(service: moeserve.BackgroundService, client: moeserve.Client, remote: Any, sequence: torch.Tensor) -> None:
    with torch.no_grad():
        remote(sequence)
    layers = client.stats().layers
    for layer in layers:
        dropped = int(layer.dropped.sum())
        console.print(f"{layer.name:20} {layer.tokens} tokens, {dropped} of {dropped + int(layer.processed.sum())} choices dropped")
    dropped = sum(int(layer.dropped.sum()) for layer in layers)
    page = http.client.HTTPConnection(service.metrics_target)  # unlike urllib, it uses no proxy
    page.request("GET", "/metrics")
    families = text_string_to_metric_families(page.getresponse().read().decode())
    samples = [sample for family in families for sample in family.samples]
    counted = sum(sample.value for sample in samples if sample.name == "moeserve_expert_dropped_tokens_total")
    check(dropped > 0, f"{dropped} choices were dropped")
    check(counted == dropped, f"/metrics counts {counted:.0f} dropped choices, too")


def headline(text: str) -> None:
    console.print()
    console.print(f"[bold]{text}[/]")


def bar(share: float) -> str:
    return BLOCKS[round(share * (len(BLOCKS) - 1))] * 2


def check(holds: bool, what: str) -> None:
    console.print(f"  [{'green]✓' if holds else 'red]✗'}[/] {what}")
    if not holds:
        failures.append(what)


if __name__ == "__main__":
    sys.exit(main())
