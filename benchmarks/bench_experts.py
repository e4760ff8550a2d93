"""One MoE layer on this processor: moeserve's, transformers' own block, and what the hardware allows; the same weights, turn by turn.

`python benchmarks/bench_experts.py [--shapes qwen3] [--dtypes bfloat16] [--tokens 1,64] [--threads 1,2] [--kernel auto] [--json]`.
transformers: the fastest of its implementations (eager, batched_mm, grouped_mm), asked anew for every row of the table. The floor is the
longer of two times: that of reading the experts which the tokens touch, at the bandwidth measured here, and that of multiplying, at the
speed of a large matmul in the same type. int8 is compared with transformers' bfloat16, for it has no such experts.
T tokens, H hidden size, I intermediate size, E experts, K choices per token.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
import transformers
from bench_precision import cpu_model
from rich.console import Console
from rich.table import Table
from torch import nn

from moeserve import MoELayer
from moeserve.allocator import keep_large_blocks
from moeserve.kernels import fastest_of

TINY = {
    "vocab_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "tie_word_embeddings": False,
}
#: by name: the family and its sizes
SHAPES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "mixtral": ("mixtral", {"hidden_size": 1024, "intermediate_size": 4096, "num_local_experts": 8, "num_experts_per_tok": 2}),
    "qwen3": (
        "qwen3_moe",
        {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True},
    ),
    "deepseek": (
        "deepseek_v3",
        {
            "hidden_size": 1024,
            "moe_intermediate_size": 256,
            "n_routed_experts": 256,
            "num_experts_per_tok": 8,
            "n_shared_experts": 1,
            "first_k_dense_replace": 0,
            "n_group": 8,
            "topk_group": 4,
            **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
        },
    ),
    "gpt-oss": ("gpt_oss", {"hidden_size": 2880, "intermediate_size": 2880, "num_local_experts": 32, "num_experts_per_tok": 4}),
    "many-small": (
        "qwen3_moe",
        {"hidden_size": 256, "moe_intermediate_size": 128, "num_experts": 256, "num_experts_per_tok": 2, "norm_topk_prob": True},
    ),
    "few-small": (
        "qwen3_moe",
        {"hidden_size": 256, "moe_intermediate_size": 128, "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True},
    ),
}
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
#: batched_mm copies the weights of every pair: beyond so many bytes it is neither fast nor possible
MAX_COPIED_BYTES = 2**30


@dataclass(frozen=True)
class Row:
    """Milliseconds of one call; error: relative, of moeserve's answers to transformers', of the median token.

    In bfloat16 their gates may choose otherwise for some tokens.
    """

    shape: str
    weights: str
    threads: int
    tokens: int
    kernel: str
    moeserve_ms: float
    transformers_ms: float
    implementation: str
    floor_ms: float
    error: float

    @property
    def speedup(self) -> float:
        return self.transformers_ms / self.moeserve_ms


def main() -> None:
    options = parse()
    keep_large_blocks()  # as the server does
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    rows = [row for shape in options.shapes.split(",") for dtype in options.dtypes.split(",") for row in measured(shape, dtype, options)]
    about = (
        f"{date.today()}, {cpu_model()}, moeserve {version('moeserve')}, torch {version('torch')}, transformers {version('transformers')}"
    )
    if options.json:
        print(json.dumps({"about": about, "rows": [asdict(row) for row in rows]}, indent=2))
    else:
        Console(width=140).print(about, table(rows), summary(rows))


def measured(shape: str, weights: str, options: argparse.Namespace) -> Iterator[Row]:
    dtype = torch.bfloat16 if weights == "int8" else getattr(torch, weights)
    with tempfile.TemporaryDirectory() as folder:
        family, sizes = SHAPES[shape]
        model = made(family, sizes, dtype)
        model.save_pretrained(folder)
        for threads in map(int, options.threads.split(",")):
            torch.set_num_threads(threads)
            layer = MoELayer.from_checkpoint(folder, 0, dtype, quantization="int8" if weights == "int8" else None)
            yield from rows_of(shape, weights, layer, model, options)
            del layer
            gc.collect()


def made(family: str, sizes: Mapping[str, Any], dtype: torch.dtype) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **{**TINY, **sizes})
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()  # type: ignore[no-any-return]


def rows_of(shape: str, weights: str, layer: MoELayer, model: transformers.PreTrainedModel, options: argparse.Namespace) -> Iterator[Row]:
    block: nn.Module = model.get_submodule("model.layers.0.mlp")
    dtype, threads = next(model.parameters()).dtype, torch.get_num_threads()
    bandwidth, peak = bandwidth_bytes_per_s(), flops_per_s(dtype)
    expert_bytes = layer.bank.nbytes / layer.bank.num_experts
    multiplications = expert_bytes / (1 if weights == "int8" else dtype.itemsize)
    for count in map(int, options.tokens.split(",")):
        rows = torch.randn(count, layer.spec.hidden_size, generator=torch.Generator().manual_seed(count)).to(dtype)
        with torch.inference_mode():
            ours, theirs = layer.run(rows, return_routing=True), answer_of(block(rows[None]))
        assert ours.topk_ids is not None
        pairs, touched = count * layer.spec.gating.top_k, len(ours.topk_ids.unique())
        if layer.spec.shared_mixing:
            pairs, touched = pairs + count, touched + 1
        candidates: dict[str, Callable[[], object]] = {"moeserve": partial(layer, rows)}
        for name in IMPLEMENTATIONS:
            if name != "batched_mm" or pairs * expert_bytes < MAX_COPIED_BYTES:
                candidates[name] = partial(ask, model, block, name, rows[None])
        best = fastest_of(candidates, rounds=max(3, min(options.rounds, options.rounds * 64 // count)))
        fastest = min(candidates.keys() - {"moeserve"}, key=best.__getitem__)
        floor = max(touched * expert_bytes / bandwidth, 2 * pairs * multiplications / peak)
        difference, expected = ours.hidden_states.float() - theirs.view(rows.shape).float(), theirs.view(rows.shape).float()
        error = float((difference.norm(dim=1) / expected.norm(dim=1)).median())
        kernel = layer.bank.kernel or "torch"
        yield Row(shape, weights, threads, count, kernel, best["moeserve"] * 1e3, best[fastest] * 1e3, fastest, floor * 1e3, error)


@torch.inference_mode()
def ask(model: transformers.PreTrainedModel, block: nn.Module, implementation: str, rows: torch.Tensor) -> None:
    model.config._experts_implementation = implementation
    block(rows)


def answer_of(of_block: Any) -> torch.Tensor:
    return of_block[0] if isinstance(of_block, tuple) else of_block  # type: ignore[no-any-return]


def bandwidth_bytes_per_s() -> float:
    """Of reading 256 MiB of float32 once."""
    numbers = torch.ones(2**26)
    return numbers.nbytes / fastest_of({"sum": numbers.sum}, rounds=5)["sum"]


def flops_per_s(dtype: torch.dtype) -> float:
    """Of a matmul of 2048 x 2048 x 2048."""
    a, b = (torch.randn(2048, 2048).to(dtype) for _ in range(2))
    return 2 * 2048**3 / fastest_of({"matmul": partial(torch.mm, a, b)}, rounds=5)["matmul"]


def table(rows: list[Row]) -> Table:
    made = Table("shape", "weights", "kernel")
    for column in ("threads", "T", "moeserve ms", "transformers ms", "its fastest", "speedup", "floor ms", "of the floor", "error"):
        made.add_column(column, justify="right")
    for row in rows:
        what = (row.shape, row.weights, row.kernel, str(row.threads), str(row.tokens))
        times = (f"{row.moeserve_ms:.2f}", f"{row.transformers_ms:.2f}", row.implementation, f"{row.speedup:.2f}")
        made.add_row(*what, *times, f"{row.floor_ms:.2f}", f"{row.floor_ms / row.moeserve_ms:.2f}", f"{row.error:.1e}")
    return made


def summary(rows: list[Row]) -> str:
    speedups = [row.speedup for row in rows]
    mean, slower = math.exp(sum(map(math.log, speedups)) / len(speedups)), sum(each < 1 for each in speedups)
    return f"{len(rows)} rows; speedup: geometric mean {mean:.2f}, least {min(speedups):.2f}, below 1.0 in {slower}"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="mixtral,qwen3,deepseek,gpt-oss")
    parser.add_argument("--dtypes", default="bfloat16,float32,int8")
    parser.add_argument("--tokens", default="1,4,16,64,256,1024")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=15, help="calls of each, at T <= 64; fewer above, at least 3")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser.parse_args()


if __name__ == "__main__":
    main()
