"""Checkpoints as DeepSpeed writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from moeserve.compat import load
from moeserve.compat.deepspeed import MoE
from moeserve.config import GatingConfig
from tests.compat.modules import EXPERTS, HIDDEN, shaken

PARAMETERS = {"num_experts": EXPERTS, "k": 2, "top2_2nd_expert_sampling": False, "eval_capacity_factor": 0.7, "min_capacity": 2}


def gating(**more: Any) -> GatingConfig:
    return load("deepspeed", {"hidden_size": HIDDEN, **PARAMETERS, **more}).config.layers[0].gating


def model_of(expert: nn.Module, use_residual: bool = False) -> nn.Module:
    """Two MoE layers and a dense one, at the depth where Megatron-DeepSpeed has them."""
    blocks = {str(index): MoE(HIDDEN, expert, use_residual=use_residual, **PARAMETERS) for index in (1, 3)}  # type: ignore[arg-type]
    model = nn.ModuleDict({"encoder": nn.ModuleDict({**blocks, "dense": nn.Linear(HIDDEN, HIDDEN)})})
    return shaken(model)


def write(folder: Path, model: nn.Module) -> Path:
    """What `_save_moe_checkpoint` of DeepSpeed 0.19.8 writes for one rank, without the optimizer."""
    folder.mkdir(parents=True)
    rest = dict(model.state_dict())
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, MoE)]
    for number, (name, layer) in enumerate(layers):
        experts = {key: value for key, value in layer.state_dict().items() if "expert" in key and "moe.gate.wg.weight" not in key}
        for expert in range(layer.num_experts):
            prefix = f"deepspeed_moe.experts.deepspeed_experts.{expert}."
            state = {f"{name}.{key}": value.clone() for key, value in experts.items() if key.startswith(prefix)}
            torch.save(state, folder / f"layer_{number}_expert_{expert}_mp_rank_00_model_states.pt")
        for key in experts:
            rest.pop(f"{name}.{key}" if name else key)
    main = {"module": rest, "lr_scheduler": None, "skipped_steps": 0, "ds_config": {"zero": [1, 2.5, "x"]}, "ds_version": "0.19.8"}
    torch.save(main, folder / "mp_rank_00_model_states.pt")
    (folder.parent / "latest").write_text(folder.name)
    return folder


def config(folder: Path, **entry: Any) -> dict[str, Any]:
    return {"model": {"checkpoint": folder}, "layers": [{"gating": gating(), **entry}]}
