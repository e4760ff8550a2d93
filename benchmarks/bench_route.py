"""The gate against transformers' own router code and against bare torch.softmax + topk.

`python benchmarks/bench_route.py --help`. The sides take turns; medians are reported. Prints a markdown table.
T tokens, E experts, K choices per token, as in DeepSeek-V3: sigmoid, selection bias, 4 of 8 groups by their best two, renormalised.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from types import SimpleNamespace

import torch
from torch import Tensor
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3 import modeling_deepseek_v3

from moeserve import GatingConfig, route
from moeserve.allocator import keep_large_blocks

Side = Callable[[], object]
BASELINE = "torch.softmax + topk"


def main() -> None:
    options = parse()
    keep_large_blocks()  # as the server does, for all sides alike
    torch.set_num_threads(options.threads)
    with torch.inference_mode():
        medians_ms = measure(sides(options.tokens, options.experts, options.top_k), options.repeats)
    print(f"T={options.tokens}, E={options.experts}, K={options.top_k}, {options.threads} threads, {platform.machine()},", end=" ")
    print(f"torch {version('torch')}, transformers {version('transformers')}\n")
    print("| | median ms | x softmax + topk |\n|---|--:|--:|")
    for name, median_ms in medians_ms.items():
        print(f"| {name} | {median_ms:.2f} | {median_ms / medians_ms[BASELINE]:.2f} |")


def sides(num_tokens: int, num_experts: int, top_k: int) -> Mapping[str, Side]:
    generator = torch.Generator().manual_seed(0)
    router_logits = torch.randn(num_tokens, num_experts, generator=generator)
    bias = torch.randn(num_experts, generator=generator) * 0.01
    gating = GatingConfig(
        top_k=top_k,
        scoring_func="sigmoid",
        num_expert_groups=8,
        topk_groups=4,
        group_score="top2_sum",
        renormalize="pre_drop",
        routed_scaling_factor=2.5,
    )
    limited = gating.model_copy(update={"capacity_factor": 1.0})
    plain = GatingConfig(top_k=top_k)
    return {
        BASELINE: lambda: router_logits.softmax(dim=1).topk(top_k, dim=1),
        "transformers DeepseekV3TopkRouter": theirs(router_logits, bias, top_k),
        "moeserve.route": lambda: route(router_logits, gating, score_correction_bias=bias),
        "moeserve.route, capacity": lambda: route(router_logits, limited, score_correction_bias=bias),
        "moeserve.route, softmax": lambda: route(router_logits, plain),
    }


def theirs(router_logits: Tensor, bias: Tensor, top_k: int) -> Side:
    """Their router on the same logits: its linear map is taken out, because `route` starts behind it."""
    num_experts = router_logits.shape[1]
    vars(modeling_deepseek_v3)["F"] = SimpleNamespace(linear=lambda hidden_states, weight: hidden_states)
    config = DeepseekV3Config(
        hidden_size=num_experts,
        n_routed_experts=num_experts,
        num_experts_per_tok=top_k,
        n_group=8,
        topk_group=4,
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
    )
    router = modeling_deepseek_v3.DeepseekV3TopkRouter(config)
    router.e_score_correction_bias.copy_(bias)
    return lambda: router(router_logits)


def measure(sides: Mapping[str, Side], repeats: int) -> dict[str, float]:
    """Median milliseconds of each side; one repetition of every side, then the next."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats + 3):
        for name, side in sides.items():
            started = time.perf_counter()
            side()
            if repeat >= 3:
                times[name].append((time.perf_counter() - started) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=30)
    return parser.parse_args()


if __name__ == "__main__":
    main()
