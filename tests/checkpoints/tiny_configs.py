"""Keys of config.json that several tiny models have in common.

E experts, H hidden size, I intermediate size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HIDDEN, INTERMEDIATE, EXPERTS = 32, 24, 8

BASE: Mapping[str, Any] = {
    "vocab_size": 16,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
MOE = {"moe_intermediate_size": INTERMEDIATE, "intermediate_size": 40, "num_experts": EXPERTS, "num_experts_per_tok": 3}
ALL = {"intermediate_size": INTERMEDIATE, "num_local_experts": EXPERTS, "num_experts_per_tok": 3}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "head_dim": 8}
DEEPSEEK = {
    "moe_intermediate_size": INTERMEDIATE,
    "intermediate_size": 40,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.7,
    "norm_topk_prob": True,
}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
MAMBA = {"mamba_d_state": 4, "mamba_expand": 2, "mamba_n_heads": 2, "mamba_d_head": 32, "mamba_n_groups": 1}
LLAMA4 = {**ALL, "num_experts_per_tok": 2, "intermediate_size_mlp": 40, "interleave_moe_layer_step": 2, "head_dim": 16}
