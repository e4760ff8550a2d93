"""Whole Hugging Face models with their experts in a service, loaded without them, against the same models in one process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from moeserve import Client, ConfigError, load_model
from tests.harness import ServiceHarness

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 16, "norm_topk_prob": True},
}


def random_model(family: str, folder: Path, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family], **changes})
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager", dtype=torch.float32).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_32_tokens_and_logits(family: str, tmp_path: Path) -> None:
    local = random_model(family, tmp_path / "model")
    prompt = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(1))
    config = {"model": {"checkpoint": tmp_path / "model"}, "placement": {"num_hosts": 2}}
    with ServiceHarness(config, "local", tmp_path) as service, Client(service.target) as client, torch.no_grad():
        remote = load_model(tmp_path / "model", client, dtype=torch.float32)
        torch.testing.assert_close(remote(prompt).logits, local(prompt).logits, rtol=1e-4, atol=1e-4)
        tokens = [model.generate(prompt, max_new_tokens=32, do_sample=False) for model in (remote, local)]
    assert torch.equal(*tokens)
    assert type(remote) is type(local)


HOLDS = """
import sys
from pathlib import Path
from moeserve import load_model
resident = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
before = resident()
model = load_model(sys.argv[1], sys.argv[2])
print(resident() - before, sum(weight.nbytes for weight in model.parameters()))
"""


def test_the_client_neither_reads_nor_holds_the_experts(tmp_path: Path) -> None:
    """96 MiB of experts: the peak of the process that loads the rest of the model stays far below."""
    local = random_model("qwen3_moe", tmp_path / "model", hidden_size=256, num_experts=64, moe_intermediate_size=256)
    experts = sum(weight.nbytes for name, weight in local.named_parameters() if ".experts." in name)
    rest = sum(weight.nbytes for weight in local.parameters()) - experts
    assert experts == 96 * 2**20
    with ServiceHarness({"model": {"checkpoint": tmp_path / "model"}}, "local", tmp_path) as service:
        command = [sys.executable, "-c", HOLDS, str(tmp_path / "model"), service.target]
        run = subprocess.run(command, check=False, capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stderr
    grown, held = map(int, run.stdout.split())
    assert held == rest
    assert grown < experts // 2, f"{grown / 2**20:.0f} MiB"


def test_a_service_of_another_model_is_refused(tmp_path: Path) -> None:
    random_model("mixtral", tmp_path / "one")
    random_model("mixtral", tmp_path / "other", num_local_experts=8)
    with (
        ServiceHarness({"model": {"checkpoint": tmp_path / "one"}}, "local", tmp_path) as service,
        pytest.raises(
            ConfigError, match=r"/other: model\.layers\.0\.mlp\.experts has 8 experts of hidden size 32, the served layer .* has 4"
        ),
    ):
        load_model(tmp_path / "other", service.target)
