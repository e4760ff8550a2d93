"""Versions of the weights of tiny-moe, and what a layer of them makes of rows: in plain torch, expert by expert.

V versions, E experts, T rows, H hidden size.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import linear, silu

LAYERS, EXPERTS, HIDDEN, TOP_K = 4, 8, 128, 2
VERSIONS = 3
#: rows of a question, and how many questions there are
ROWS, QUESTIONS = 64, 16

#: the version of every expert of a layer
Mix = tuple[int, ...]


def layer_name(layer: int) -> str:
    return f"model.layers.{layer}.mlp"


def _prefix(layer: int) -> str:
    return f"model.layers.{layer}.block_sparse_moe"


def versions(tiny_moe: Path, folder: Path) -> list[Path]:
    """Folders of the same model: in version v, an expert has the weights that another has in version 0."""
    tensors = load_file(tiny_moe / "model.safetensors")
    paths = [tiny_moe]
    for version in range(1, VERSIONS):
        path = folder / f"version-{version}"
        shutil.copytree(tiny_moe, path)
        turned = {
            f"{_prefix(layer)}.experts.{expert}.{part}.weight": tensors[
                f"{_prefix(layer)}.experts.{(expert + version) % EXPERTS}.{part}.weight"
            ].clone()
            for layer in range(LAYERS)
            for expert in range(EXPERTS)
            for part in ("w1", "w2", "w3")
        }
        save_file({**tensors, **turned}, path / "model.safetensors", metadata={"format": "pt"})
        paths.append(path)
    return paths


class DenseLayer:
    """Every expert of every version computes every row of all questions, once; an answer is a sum of these."""

    def __init__(self, paths: Sequence[Path], layer: int) -> None:
        files = [{name: tensor.float() for name, tensor in load_file(path / "model.safetensors").items()} for path in paths]
        gate = files[0][f"{_prefix(layer)}.gate.weight"]
        self.questions = _skewed(gate, layer).view(QUESTIONS, ROWS, HIDDEN)
        scores = linear(self.questions, gate).softmax(-1)
        best = scores.topk(TOP_K, dim=-1)
        chosen = best.values / best.values.sum(-1, keepdim=True)
        self._shares = torch.zeros_like(scores).scatter(-1, best.indices, chosen)  # [QUESTIONS, T, E]
        self._computed = [[self._expert(each, f"{_prefix(layer)}.experts.{expert}") for expert in range(EXPERTS)] for each in files]

    def answer(self, question: int, mix: Mix) -> Tensor:
        """[T, H], with these versions of its experts."""
        computed = torch.stack([self._computed[version][expert][question] for expert, version in enumerate(mix)], dim=-1)
        return (computed * self._shares[question].unsqueeze(1)).sum(-1)

    def _expert(self, tensors: dict[str, Tensor], name: str) -> Tensor:
        w1, w2, w3 = (tensors[f"{name}.{part}.weight"] for part in ("w1", "w2", "w3"))
        return linear(silu(linear(self.questions, w1)) * linear(self.questions, w3), w2)


def _skewed(gate: Tensor, seed: int) -> Tensor:
    """[QUESTIONS * T, H]: rows whose first choices are spread over the experts by Zipf's law, another one first in each layer."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(8 * QUESTIONS * ROWS, HIDDEN, generator=generator)
    wanted = torch.arange(1, EXPERTS + 1).float().pow(-1.5).roll(seed)
    first = linear(rows, gate).argmax(-1)
    share = wanted / torch.bincount(first, minlength=EXPERTS)
    return rows[torch.multinomial(share[first], QUESTIONS * ROWS, generator=generator)]
