"""A layer published in each format. E experts, H hidden size, I intermediate size."""

from __future__ import annotations

import atexit
import re
from functools import cache
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp

import torch
from torch import nn

from tests.checkpoints.published import PUBLISHED
from tests.checkpoints.saved import rewritten, tensors_of
from tests.checkpoints.tiny_models import moe_block, new_model

LAYER = "model.layers.1.mlp"
HIDDEN, INTERMEDIATE = 128, 192
SIZES = {"hidden_size": HIDDEN, "moe_intermediate_size": INTERMEDIATE, "shared_expert_intermediate_size": 64, "mlp_only_layers": [0]}

Case = tuple[Path, nn.Module]


def in_a_new_folder(name: str) -> Path:
    folder = Path(mkdtemp(prefix=name))
    atexit.register(rmtree, folder)
    return folder


@cache
def original() -> Path:
    folder = in_a_new_folder("original-")
    new_model("qwen2_moe", **SIZES).save_pretrained(folder)
    return folder


@cache
def published_case(title: str) -> Case:
    """A checkpoint in the format, and the block of transformers that has its numbers."""
    published, generator = PUBLISHED[title], torch.Generator().manual_seed(3)
    tensors, numbers = tensors_of(original()), {}
    for name in [name for name in tensors if re.search(r"layers\.1\.mlp\.(shared_expert|experts\.\d+)\.\w+\.weight$", name)]:
        if "shared_expert" in name and "expert_dtype" in published.quantization_config:
            numbers[name] = tensors[name]
            continue
        shape = tensors.pop(name).shape
        stored, numbers[name] = published.write(name.removesuffix(".weight"), (shape[0], shape[1]), generator)
        tensors |= stored
    settings = published.quantization_config
    folder = rewritten(original(), in_a_new_folder("published-"), tensors, dtype="bfloat16", quantization_config=settings)
    block = moe_block(new_model("qwen2_moe", **SIZES), "qwen2_moe")
    for expert in range(8):
        own = {kind: numbers[f"{LAYER}.experts.{expert}.{kind}_proj.weight"] for kind in ("gate", "up", "down")}
        block.experts.gate_up_proj.data[expert] = torch.cat([own["gate"], own["up"]])
        block.experts.down_proj.data[expert] = own["down"]
    for kind in ("gate", "up", "down"):
        getattr(block.shared_expert, f"{kind}_proj").weight.data = numbers[f"{LAYER}.shared_expert.{kind}_proj.weight"]
    return folder, block
