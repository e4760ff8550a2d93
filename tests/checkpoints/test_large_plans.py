"""A model of 671 billion parameters is planned from its config.json and its index alone: there are no weight files here at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moeserve import CheckpointError, MoELayer, load_config
from moeserve.checkpoints import layer_sources
from moeserve.cli.app import main
from moeserve.experts import ExpertShard

LAYERS, DENSE, EXPERTS, HIDDEN, INTERMEDIATE = 61, 3, 256, 7168, 2048
#: bytes of an expert in FP8, with a float32 scale for each block of 128 x 128
PUBLISHED = 3 * HIDDEN * INTERMEDIATE + 3 * 4 * (HIDDEN // 128) * (INTERMEDIATE // 128)


@pytest.fixture(scope="module")
def deepseek_v3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """config.json with the keys that matter, as published, and an index of 163 shards."""
    folder = tmp_path_factory.mktemp("deepseek-v3")
    config = {
        "model_type": "deepseek_v3",
        "num_hidden_layers": LAYERS,
        "first_k_dense_replace": DENSE,
        "hidden_size": HIDDEN,
        "intermediate_size": 18432,
        "moe_intermediate_size": INTERMEDIATE,
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
    }
    (folder / "config.json").write_text(json.dumps(config))
    names = [
        f"model.layers.{layer}.mlp.{part}" for layer in range(DENSE, LAYERS) for part in ("gate.weight", "gate.e_score_correction_bias")
    ]
    for layer in range(DENSE, LAYERS):
        for owner in ("shared_experts", *(f"experts.{expert}" for expert in range(EXPERTS))):
            for projection in ("gate", "up", "down"):
                weight = f"model.layers.{layer}.mlp.{owner}.{projection}_proj.weight"
                names += [weight, f"{weight}_scale_inv"]
    weight_map = {name: f"model-{1 + 163 * number // len(names):05}-of-000163.safetensors" for number, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def test_the_plan(deepseek_v3: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    command = ["plan", str(deepseek_v3), "--num-hosts", "16"]
    assert main(command) == 2
    shown, refused = capsys.readouterr()
    assert "16 hosts would hold" in refused and "but this machine has" in refused
    code = main([*command, "--address", "10.0.0.1:6379"])
    out = capsys.readouterr().out
    assert (code, out) == (0, shown)
    assert "58 MoE layers" in out
    assert "16 hosts" in out
    assert "model.layers.60.mlp" in out
    assert "swiglu FP8 128 x 128" in out
    # 58 layers of 16 experts and the shared one.
    assert f"{58 * 17 * PUBLISHED / 2**20:.1f} MiB" in out


def test_the_plan_of_decoded_weights(deepseek_v3: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", str(deepseek_v3), "--num-hosts", "8", "--address", "10.0.0.1:6379"]
    assert main(command) == 0
    assert f"{58 * 33 * PUBLISHED / 2**20:.1f} MiB" in capsys.readouterr().out
    assert main([*command, "--quantization", "none"]) == 0
    out = capsys.readouterr().out
    assert f"{58 * 33 * 3 * HIDDEN * INTERMEDIATE * 2 / 2**20:.1f} MiB" in out
    assert "swiglu bfloat16" in out


def test_sizes_and_gate(deepseek_v3: Path) -> None:
    sources = layer_sources(load_config(deepseek_v3))
    assert [source.spec.name for source in sources] == [f"model.layers.{layer}.mlp" for layer in range(DENSE, LAYERS)]
    assert {source.nbytes(ExpertShard(255)) for source in sources} == {PUBLISHED}
    gating = sources[0].spec.gating
    assert (gating.scoring_func, gating.num_expert_groups, gating.topk_groups, gating.group_score) == ("sigmoid", 8, 4, "top2_sum")
    assert (gating.renormalize, gating.routed_scaling_factor, sources[0].spec.shared_mixing) == ("pre_drop", 2.5, "add")


def test_the_weights_are_missed_when_they_are_needed(deepseek_v3: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model-00001-of-000163\.safetensors is missing, but .* names it"):
        MoELayer.from_checkpoint(deepseek_v3)
