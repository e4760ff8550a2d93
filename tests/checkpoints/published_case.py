"""A layer published in each format. E experts, H hidden size, I intermediate size."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import torch
from torch import Tensor, nn

from tests.checkpoints.published import PUBLISHED
from tests.checkpoints.saved import rewritten, tensors_of
from tests.checkpoints.tiny_models import moe_block, new_model

LAYER = "model.layers.1.mlp"
HIDDEN, INTERMEDIATE = 128, 192
_SIZES = {"hidden_size": HIDDEN, "moe_intermediate_size": INTERMEDIATE, "shared_expert_intermediate_size": 64, "mlp_only_layers": [0]}


@cache
def original() -> Path:
    """The same model in float32."""
    folder = Path(mkdtemp(prefix="original-"))
    new_model("qwen2_moe", **_SIZES).save_pretrained(folder)
    return folder


def published_case(name: str, folder: Path) -> tuple[Path, nn.Module]:
    """A checkpoint in the format of that name, and the block of transformers that has its numbers."""
    published, generator = PUBLISHED[name], torch.Generator().manual_seed(3)
    tensors, numbers = tensors_of(original()), dict[str, Tensor]()
    for weight in [weight for weight in tensors if re.search(r"layers\.1\.mlp\.(shared_expert|experts\.\d+)\.\w+\.weight$", weight)]:
        module = weight.removesuffix(".weight")
        if "shared_expert" in weight and "expert_dtype" in published.quantization_config:
            numbers[weight] = tensors[weight]
            continue
        stored, numbers[weight] = published.write(module, tuple(tensors.pop(weight).shape), generator)
        tensors |= stored
    rewritten(original(), folder, tensors, dtype="bfloat16", quantization_config=published.quantization_config)
    block = moe_block(new_model("qwen2_moe", **_SIZES), "qwen2_moe")
    for expert in range(8):
        own = {kind: numbers[f"{LAYER}.experts.{expert}.{kind}_proj.weight"] for kind in ("gate", "up", "down")}
        block.experts.gate_up_proj.data[expert] = torch.cat([own["gate"], own["up"]])
        block.experts.down_proj.data[expert] = own["down"]
    for kind in ("gate", "up", "down"):
        getattr(block.shared_expert, f"{kind}_proj").weight.data = numbers[f"{LAYER}.shared_expert.{kind}_proj.weight"]
    return folder, block
