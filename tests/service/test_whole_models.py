"""Whole Hugging Face models with their experts in a service, loaded without them, against the same models in one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

from moeserve import CheckpointError, Client, ConfigError, load_model
from tests.checkpoints.saved import rewritten, saved, tensors_of
from tests.checkpoints.tiny_models import HIDDEN, SETTINGS, auto_class, new_model, tiny_model
from tests.support.closeness import assert_close
from tests.support.harness import ServiceHarness

#: two layers, each with norms, attention or a recurrence, and experts over at most eight times the hidden size; then norm and head
SUMMED = 2 * 8 * HIDDEN + 2 * HIDDEN


def random_qwen(folder: Path, **changes: Any) -> PreTrainedModel:
    model: PreTrainedModel = new_model("qwen3_moe", **changes)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("family", SETTINGS)
def test_the_same_32_tokens_and_logits(family: str, tmp_path: Path) -> None:
    local, folder = tiny_model(family), saved(family)
    prompt = torch.randint(3, 16, (2, 9), generator=torch.Generator().manual_seed(1))
    config = {"model": {"checkpoint": folder}, "placement": {"num_hosts": 2}}
    with ServiceHarness(config, "local", tmp_path) as service, Client(service.target) as client, torch.no_grad():
        remote = load_model(folder, client, auto_class(family), dtype=torch.float32)
        assert_close(remote(input_ids=prompt).logits, local(input_ids=prompt).logits, SUMMED)
        if not local.can_generate():
            return
        options = {"max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False}
        tokens = [model.generate(input_ids=prompt, **options) for model in (remote, local)]
        asked = client.stats().layers
    assert torch.equal(*tokens)
    assert tokens[0].shape == (2, 41)
    assert all(layer.tokens > 32 for layer in asked), "every layer was answered by the service"
    assert type(remote) is type(local)


@pytest.mark.parametrize("family", SETTINGS)
def test_padding_is_neither_computed_nor_counted(family: str, tmp_path: Path) -> None:
    local, folder = tiny_model(family), saved(family)
    prompt = torch.randint(3, 16, (2, 9), generator=torch.Generator().manual_seed(1))
    used = torch.arange(9) >= torch.tensor([[4], [0]])
    prompt, mask = prompt * used, used.long()
    #: Llama 4 sends a row for each choice
    each = 2 if family.startswith("llama4") else 1
    config = {"model": {"checkpoint": folder}, "placement": {"num_hosts": 2}}
    with ServiceHarness(config, "local", tmp_path) as service, Client(service.target) as client, torch.no_grad():
        remote = load_model(folder, client, auto_class(family), dtype=torch.float32)
        ours, theirs = (model(input_ids=prompt, attention_mask=mask).logits[used] for model in (remote, local))
        assert_close(ours, theirs, SUMMED)
        assert {layer.tokens for layer in client.stats().layers} == {14 * each}
        if not local.can_generate():
            return
        options = {"attention_mask": mask, "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
        tokens = [model.generate(input_ids=prompt, **options) for model in (remote, local)]
        assert torch.equal(*tokens)
        assert {layer.tokens for layer in client.stats().layers} == {(14 + 14 + 2 * 7) * each}


HOLDS = """
import sys
from pathlib import Path
from moeserve import load_model
actor = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
before = actor()
model = load_model(sys.argv[1], sys.argv[2])
print(actor() - before, sum(weight.nbytes for weight in model.parameters()))
"""


def test_the_client_neither_reads_nor_holds_the_experts(tmp_path: Path) -> None:
    """48 MiB of experts: the peak of the process that loads the rest of the model stays far below."""
    local = random_qwen(tmp_path / "model", hidden_size=256, num_experts=64, moe_intermediate_size=256)
    experts = sum(weight.nbytes for name, weight in local.named_parameters() if ".experts." in name)
    rest = sum(weight.nbytes for weight in local.parameters()) - experts
    assert experts == 48 * 2**20
    with ServiceHarness({"model": {"checkpoint": tmp_path / "model"}}, "local", tmp_path) as service:
        command = [sys.executable, "-c", HOLDS, str(tmp_path / "model"), service.target]
        run = subprocess.run(command, check=False, capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stderr
    grown, held = map(int, run.stdout.split())
    assert held == rest
    assert grown < experts // 2, f"{grown / 2**20:.0f} MiB"


def test_quantizers_of_gpus_bring_no_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is a GPU, transformers makes modules of its own of experts in FP8, which have weights."""
    monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda *_args, **_options: None)
    numbers, stored = tensors_of(saved("qwen3_moe")), {}
    for name in [name for name in numbers if ".experts." in name]:
        weight = (numbers[name] * 8).to(torch.float8_e4m3fn)
        stored |= {name: weight, f"{name}_scale_inv": torch.full((weight.shape[0] // 8, weight.shape[1] // 8), 0.125)}
        numbers[name] = weight.float() / 8
    others = ["lm_head", r"model\.layers\.1\.self_attn", "mlp.gate", "model.layers.0"]
    settings = {"quant_method": "fp8", "weight_block_size": [8, 8], "modules_to_not_convert": others}
    plain = rewritten(saved("qwen3_moe"), tmp_path / "plain", numbers)
    folder = rewritten(saved("qwen3_moe"), tmp_path / "fp8", numbers | stored, quantization_config=settings)
    prompt = torch.randint(3, 16, (2, 9), generator=torch.Generator().manual_seed(1))
    with ServiceHarness({"model": {"checkpoint": folder}}, "local", tmp_path) as service, Client(service.target) as client, torch.no_grad():
        remote = load_model(folder, client, dtype=torch.float32)
        assert not [name for name, _ in remote.named_parameters() if ".experts." in name]
        local = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
        assert_close(remote(input_ids=prompt).logits, local(input_ids=prompt).logits, SUMMED)


def test_a_service_of_another_model_is_refused(tmp_path: Path) -> None:
    random_qwen(tmp_path / "one")
    random_qwen(tmp_path / "other", num_experts=4)
    with (
        ServiceHarness({"model": {"checkpoint": tmp_path / "one"}}, "local", tmp_path) as service,
        pytest.raises(
            ConfigError, match=r"/other: model\.layers\.\d\.mlp\.experts has 4 experts of hidden size 32, the served layer .* has 8"
        ),
    ):
        load_model(tmp_path / "other", service.target)


def _no_folder(_folder: Path) -> str:
    return r"^checkpoint folder \S+/model does not exist, and transformers finds no model of that name$"


def _empty(folder: Path) -> str:
    folder.mkdir()
    return r"/model: transformers cannot use its config\.json: Unrecognized model in \S+/model\."


def _no_json(folder: Path) -> str:
    folder.mkdir()
    (folder / "config.json").write_text("{")
    return r"/model: transformers cannot use its config\.json: .* is not a valid JSON file\.$"


def _no_table(folder: Path) -> str:
    folder.mkdir()
    (folder / "config.json").write_text("[]")
    return r"/model: transformers cannot use its config\.json: \S+"


def _with(folder: Path, **changes: Any) -> None:
    random_qwen(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def _of_another_size(folder: Path) -> str:
    _with(folder, vocab_size=7)
    return r"/model: transformers cannot load its weights: .*mismatched_sizes"


def _with_what_nobody_knows(folder: Path) -> str:
    _with(folder, hidden_act="nothing")
    return r"/model: transformers cannot load its weights: 'nothing'"


def _of_another_kind(folder: Path) -> str:
    _with(folder, hidden_size="many")
    return r"/model: transformers cannot use its config\.json: .*hidden_size.*many"


def _without_weights(folder: Path) -> str:
    random_qwen(folder)
    (folder / "model.safetensors").unlink()
    return r"/model: transformers cannot load its weights: .*no file named model\.safetensors"


def _with_half_of_them(folder: Path) -> str:
    random_qwen(folder)
    weights = folder / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    return r"/model: transformers cannot load its weights: \S+"


@pytest.mark.parametrize(
    "make",
    [
        _no_folder,
        _empty,
        _no_json,
        _no_table,
        _of_another_kind,
        _of_another_size,
        _with_what_nobody_knows,
        _without_weights,
        _with_half_of_them,
    ],
)
def test_a_folder_that_cannot_be_loaded_is_one_sentence(tmp_path: Path, make: Callable[[Path], str]) -> None:
    sentence = make(tmp_path / "model")
    with pytest.raises(CheckpointError, match=sentence) as caught:
        load_model(tmp_path / "model", "127.0.0.1:1")
    assert "\n" not in str(caught.value)
