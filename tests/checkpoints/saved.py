"""Checkpoint folders of the tiny models, written once, in the layouts that transformers does not write itself too.

E experts, H hidden size, I intermediate size.
"""

from __future__ import annotations

import atexit
import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moeserve.checkpoints.families import family_of
from tests.checkpoints.tiny_models import tiny_model

_GATE_UP_DOWN = {"gate_proj": 0, "w1": 0, "up_proj": 1, "w3": 1, "down_proj": 2, "w2": 2}


@cache
def saved(family: str, dtype: torch.dtype = torch.float32) -> Path:
    """As `save_pretrained` writes it, once for all tests."""
    folder = Path(mkdtemp(prefix=f"tiny-{family}-"))
    atexit.register(rmtree, folder)
    tiny_model(family, dtype).save_pretrained(folder)
    return folder


def config_of(family: str) -> dict[str, Any]:
    """A copy of the saved model's config.json."""
    config: dict[str, Any] = json.loads((saved(family) / "config.json").read_text())
    return config


def language_model(config: dict[str, Any]) -> dict[str, Any]:
    """What of it describes the layers."""
    section: dict[str, Any] = config.get("text_config", config)
    return section


def second_layer(family: str) -> str:
    """Its name, which is an MoE layer's everywhere."""
    return family_of(family).layer_name.format(index=1)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def rewritten(source: Path, folder: Path, tensors: Mapping[str, Tensor], **config: object) -> Path:
    """The same model with other tensors and keys."""
    folder.mkdir(exist_ok=True)
    text = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(text | config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def stacked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`experts.gate_up_proj` [E, 2I, H] and `experts.down_proj` [E, H, I] in place of one tensor for each projection of each expert."""
    rest, parts = {}, {}
    for name, tensor in tensors.items():
        found = re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)\.weight", name)
        if found:
            parts[found[1], _GATE_UP_DOWN[found[3]], int(found[2])] = tensor
        else:
            rest[name] = tensor
    for prefix in {prefix for prefix, _, _ in parts}:
        gate, up, down = (torch.stack([parts[key] for key in sorted(parts) if key[:2] == (prefix, part)]) for part in range(3))
        rest |= {f"{prefix}.gate_up_proj": torch.cat([gate, up], dim=1), f"{prefix}.down_proj": down}
    return rest
