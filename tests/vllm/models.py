"""Small random models that vLLM's backend for CPUs can run: heads of 32, in float32."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

_BASE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
#: the sizes of the published models: vLLM's latent attention has no others
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "head_dim": 64}
_SHARED = {"moe_intermediate_size": 32, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1}
#: as published: one group; four of two experts, with a bias for their selection
_GREEDY = {"topk_method": "greedy", "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.5}
_GROUPED = {"topk_method": "noaux_tc", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
#: model type -> what its configuration is told besides; the choices of a token, and the MoE layers
FAMILIES: Mapping[str, tuple[dict[str, Any], int, int]] = {
    "qwen3_moe": ({"moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": True}, 3, 2),
    "deepseek_v2": ({**_LATENT, **_SHARED, **_GREEDY}, 2, 1),
    "deepseek_v3": ({**_LATENT, **_SHARED, **_GROUPED}, 2, 1),
    "gpt_oss": ({"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 32, "intermediate_size": 64}, 2, 2),
}


def save(family: str, folder: Path) -> None:
    """Writes the model as transformers does."""
    import torch
    from torch import nn
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**_BASE, **FAMILIES[family][0]})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
