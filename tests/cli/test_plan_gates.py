"""`moeserve plan` shows what the gate of every layer computes, a line for layers that are alike."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from moeserve.checkpoints import SavedLayer, layer_sources, save
from moeserve.cli.app import main
from moeserve.cli.gates import gate_line
from moeserve.config import GatingConfig, LayerConfig, load_config
from tests.checkpoints.saved import rewritten, saved, tensors_of

LINES = {
    "mixtral": "softmax, top 3, renormalized, no shared expert",
    "minimax_m2": "sigmoid, selection bias, top 3, renormalized, no shared expert",
    "phimoe": "sparsemixer, top 2, not renormalized, no shared expert",
    "qwen2_moe": "softmax, top 3, not renormalized, shared expert times a sigmoid gate",
    "deepseek_v2": "softmax, top 3 in 2 of 4 groups by their best expert, not renormalized, times 1.7, shared expert added",
    "glm4_moe": "sigmoid, selection bias, top 3 in 2 of 4 groups by their two best experts, renormalized, times 1.7, shared expert added",
    "gpt_oss": "logits with a bias, softmax over the chosen logits, top 3, renormalized, no shared expert",
    "llama4_text": "sigmoid, top 2, not renormalized, weights multiply the inputs, shared expert added",
    "deepseek_v4": "experts of the token id, root of softplus, top 3, renormalized, times 1.7, shared expert added",
    "kolibri1": "sigmoid, selection bias on the logits, top 3, renormalized, shared expert added",
    "laguna": "logits within 1.5 by tanh, sigmoid, selection bias, top 3, renormalized, times 1.3, shared expert added",
    "cohere2_moe": "softmax over the chosen logits, top 3, renormalized, averaged with the shared expert",
    "longcat_flash": "softmax, selection bias, top 5, not renormalized, times 6, 4 experts answer the token itself, no shared expert",
}


@pytest.mark.parametrize("family", LINES)
def test_the_gate_of_a_family(family: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["plan", str(saved(family))]) == 0
    assert LINES[family] in capsys.readouterr().out


def test_the_gate_of_callers() -> None:
    config = {"layers": [{"hidden_size": 8, "intermediate_size": 8, "num_experts": 2, "gating": {"routing": "caller"}}]}
    assert [gate_line(source) for source in layer_sources(load_config(config))] == [
        "stays with the callers, which send topk_ids and topk_weights"
    ]


def test_layers_that_are_alike_share_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    file = tmp_path / "service.toml"
    layer = "[[layers]]\nhidden_size = 16\nintermediate_size = 8\nnum_experts = 8\ngating.top_k = {}\n"
    file.write_text("".join(layer.format(top_k) for top_k in (2, 2, 4, 2, 4, 2, 2)))
    assert main(["plan", str(file)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"0-1, 3, 5-6 +softmax, top 2, not renormalized", out)
    assert re.search(r"2, 4 +softmax, top 4, not renormalized", out)


def test_the_biases_of_our_own_folders(tmp_path: Path) -> None:
    sizes = {"hidden_size": 4, "intermediate_size": 2, "num_experts": 2}
    tensors = {"gate.weight": torch.ones(2, 4)}
    for expert in range(2):
        tensors |= {f"experts.{expert}.gate_up_proj": torch.ones(4, 4), f"experts.{expert}.down_proj": torch.ones(4, 2)}
    biases = {"gate.bias": torch.ones(2), "gate.score_correction_bias": torch.ones(2)}
    config = LayerConfig(name="a", **sizes, gating=GatingConfig(top_k=1))
    save(tmp_path, [SavedLayer(config, tensors | biases), SavedLayer(config.model_copy(update={"name": "b"}), tensors)])
    first, second = (gate_line(source) for source in layer_sources(load_config(tmp_path)))
    assert first == "logits with a bias, softmax, selection bias, top 1, not renormalized, no shared expert"
    assert second == "softmax, top 1, not renormalized, no shared expert"


def test_what_the_configuration_changes_shows(tmp_path: Path) -> None:
    folder = rewritten(saved("mixtral"), tmp_path / "model", tensors_of(saved("mixtral")))
    config = {"model": {"checkpoint": folder}, "layers": [{"gating": {"scoring_func": "sigmoid", "routed_scaling_factor": 2.5}}]}
    assert {gate_line(source) for source in layer_sources(load_config(config))} == {
        "sigmoid, top 3, renormalized, times 2.5, no shared expert"
    }
