"""Small random models of transformers, and folders that hold them in every layout that is in use.

E experts, H hidden size, I intermediate size.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FAMILIES = ("mixtral", "olmoe", "qwen3_moe")
HIDDEN_SIZE, INTERMEDIATE_SIZE, NUM_EXPERTS = 32, 24, 6

_SIZES = {
    "vocab_size": 16,
    "hidden_size": HIDDEN_SIZE,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_FAMILY_SIZES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": NUM_EXPERTS, "num_experts_per_tok": 2, "intermediate_size": INTERMEDIATE_SIZE},
    "olmoe": {"num_experts": NUM_EXPERTS, "num_experts_per_tok": 3, "intermediate_size": INTERMEDIATE_SIZE},
    # Every second layer is dense, and the last one too.
    "qwen3_moe": {
        "num_experts": NUM_EXPERTS,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": INTERMEDIATE_SIZE,
        "intermediate_size": 40,
        "head_dim": 16,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [3],
    },
}


@cache
def random_model(family: str, **changes: Any) -> Any:
    """A `PreTrainedModel` of random float32 weights, ready to run."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    config = transformers.AutoConfig.for_model(family, **_SIZES | _FAMILY_SIZES[family] | changes)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def moe_blocks(model: Any) -> dict[str, nn.Module]:
    """The MoE layers of a model of transformers, by name, in model order."""
    return {name: module for name, module in model.named_modules() if type(module).__name__.endswith("SparseMoeBlock")}


def as_saved(model: Any, folder: Path) -> None:
    """As `save_pretrained` writes it: one file, one tensor per expert."""
    model.save_pretrained(folder)


def as_saved_in_shards(model: Any, folder: Path) -> None:
    """As `save_pretrained` writes large models: shards and an index."""
    model.save_pretrained(folder, max_shard_size="30KB")


def as_stacked(model: Any, folder: Path) -> None:
    """`experts.gate_up_proj` [E, 2I, H] and `experts.down_proj` [E, H, I], as the model holds them."""
    model.save_pretrained(folder)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")


def as_mlp_experts(model: Any, folder: Path) -> None:
    """One tensor per expert, named as in `mlp.experts.0.gate_proj.weight` whatever the family."""
    names = {"block_sparse_moe": "mlp", "w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    as_saved(model, folder)
    saved = load_file(folder / "model.safetensors")
    save_file(
        {".".join(names.get(part, part) for part in name.split(".")): tensor for name, tensor in saved.items()},
        folder / "model.safetensors",
    )


LAYOUTS: dict[str, Callable[[Any, Path], None]] = {
    "saved": as_saved,
    "shards": as_saved_in_shards,
    "stacked": as_stacked,
    "mlp_experts": as_mlp_experts,
}

#: enough of a Mixtral's config.json for one layer of 4 experts, H = 8, I = 6
CONFIG: Mapping[str, Any] = {
    "model_type": "mixtral",
    "num_hidden_layers": 1,
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "hidden_act": "silu",
}
MLP = "model.layers.0.mlp"


def expert_tensors(expert: int) -> dict[str, Tensor]:
    """The three matrices of one expert of the layer that CONFIG describes."""
    generator = torch.Generator().manual_seed(expert)
    shapes = {"gate_proj": (6, 8), "up_proj": (6, 8), "down_proj": (8, 6)}
    return {f"{MLP}.experts.{expert}.{name}.weight": torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def layer_tensors() -> dict[str, Tensor]:
    """All tensors of the layer that CONFIG describes."""
    tensors = {f"{MLP}.gate.weight": torch.randn(4, 8, generator=torch.Generator().manual_seed(99))}
    for expert in range(4):
        tensors |= expert_tensors(expert)
    return tensors


def write_folder(folder: Path, config: Mapping[str, Any], *shards: Mapping[str, Tensor]) -> Path:
    """A checkpoint folder: one file, or as many shards as given, and their index."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config)))
    if len(shards) == 1:
        save_file(dict(shards[0]), folder / "model.safetensors")
        return folder
    weight_map = {}
    for number, shard in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        save_file(dict(shard), folder / file)
        weight_map |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder
