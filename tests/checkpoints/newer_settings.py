"""Tiny models of the newer families: what AutoConfig is told, with `model_type` where that is not the family's name.

Layer 1 is an MoE layer everywhere. H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.checkpoints.tiny_configs import ALL, BASE, DEEPSEEK, EXPERTS, HIDDEN, INTERMEDIATE, LATENT, LINEAR, MOE

_KDA = {"layer_types": ["linear_attention", "full_attention"], "linear_head_dim": 16, "linear_num_heads": 2}
_SPARSE = {"mlp_layer_types": ["dense", "sparse"]}
_INDEXED = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 4}
_QWEN_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "depth": 1,
    "num_heads": 2,
    "out_hidden_size": HIDDEN,
    "deepstack_visual_indexes": [0],
}
_BUDGET = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8, "indexer_compress_ratio": 4}
_NO_ROPE = {"index_topk": 16, "qk_rope_head_dim": 0, "swiglu_limit": 0.7}
_PIXTRAL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}
_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}

#: those whose language model is part of another, loaded with AutoModelForImageTextToText
WRAPPERS = (
    "mistral4",
    "qwen3_omni_moe",
    "unlimited_ocr",
    "kimi_k25",
    "glm4v_moe",
    "qwen3_vl_moe",
    "deepseek_ocr2",
    "mistral_large4",
    "glm5_next",
    "minimax_m3_vl",
    "step3p5",
)

NEWER_SETTINGS: Mapping[str, dict[str, Any]] = {
    "kimi_k25": {
        "text_config": {"model_type": "deepseek_v3", **BASE, **DEEPSEEK, **LATENT},
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
    },
    "kimi_linear": {**DEEPSEEK, **LATENT, **_KDA, **_SPARSE, "num_local_experts": EXPERTS},
    "bailing_hybrid": {
        **DEEPSEEK,
        **LATENT,
        **_SPARSE,
        "num_local_experts": EXPERTS,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "glm4v_moe": {
        "text_config": {**BASE, **DEEPSEEK, "head_dim": 16, **_ROPE},
        "vision_config": {"hidden_size": 16, "intermediate_size": 16, "depth": 1, "num_heads": 2, "out_hidden_size": HIDDEN},
    },
    "glm_moe_dsa": {**DEEPSEEK, **LATENT, **_SPARSE, **_INDEXED},
    "axk1": {**DEEPSEEK, **LATENT, **_SPARSE},
    "axk2": {**DEEPSEEK, **LATENT, **_SPARSE, **_INDEXED, "n_group": None, "topk_group": None, "gated_norm_rank": 4},
    "beam": {**MOE, **_SPARSE, "head_dim": 16, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.7},
    "mimo_v2_flash": {**DEEPSEEK, "n_shared_experts": None, **_SPARSE, "head_dim": 16, "v_head_dim": 8, "num_key_value_heads": 1},
    "hy_v3": {**MOE, **_SPARSE, "num_shared_experts": 2, "head_dim": 16, "router_scaling_factor": 1.7},
    "mistral4": {
        "model_type": "mistral3",
        "text_config": {"model_type": "mistral4", **BASE, **DEEPSEEK, **LATENT, "head_dim": 16},
        "vision_config": _PIXTRAL,
    },
    "mistral_large4": {
        "text_config": {**BASE, **DEEPSEEK, **LATENT, **_SPARSE, **_INDEXED},
        "vision_config": _PIXTRAL,
    },
    "deepseek_ocr2": {
        "text_config": {**BASE, **DEEPSEEK, **_SPARSE, "norm_topk_prob": False, "topk_method": "group_limited_greedy"},
        "vision_config": {
            "sam_config": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 64, "mlp_dim": 16},
            "encoder_config": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        },
    },
    "unlimited_ocr": {
        "text_config": {**BASE, **DEEPSEEK, **_SPARSE, "norm_topk_prob": False, "topk_method": "group_limited_greedy"},
        "vision_config": {
            "sam_config": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 64, "mlp_dim": 16},
            "encoder_config": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        },
    },
    "dots3_note_text": {**DEEPSEEK, **LATENT, **_SPARSE, **_INDEXED, "n_shared_experts": 1, "shared_experts_intermediate_size": 28},
    "qwen4_exp_text": {**MOE, **LINEAR, "shared_expert_intermediate_size": 56, "head_dim": 16, "hc_lowrank": 4, **_BUDGET},
    "qwen3_vl_moe": {
        "text_config": {**BASE, **MOE, "head_dim": 16, **_ROPE},
        "vision_config": _QWEN_VISION,
    },
    "qwen3_omni_moe": {
        "model_type": "qwen3_omni_moe_thinker",
        "vision_start_token_id": 5,
        "text_config": {**BASE, **MOE, "head_dim": 16, "norm_topk_prob": True, **_ROPE},
        "vision_config": _QWEN_VISION,
        "audio_config": {
            "d_model": 16,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 16,
            "num_mel_bins": 16,
            "downsample_hidden_size": 8,
            "output_dim": HIDDEN,
        },
    },
    "flint": {**MOE, "shared_expert_intermediate_size": 56, "head_dim": 16, "mlp_only_layers": [0]},
    "granitemoe_swa": {**ALL, "shared_intermediate_size": 40},
    "hy_v4": {**DEEPSEEK, **LATENT, **_SPARSE, **_INDEXED, "swiglu_limit": 0.7, "hc_mult": 2},
    "glm5_next": {
        "text_config": {
            **BASE,
            **DEEPSEEK,
            **LATENT,
            **_KDA,
            **_SPARSE,
            **_INDEXED,
            "index_topk": 16,
            "qk_rope_head_dim": 0,
            "swiglu_limit": 0.7,
        },
        "vision_config": {"hidden_size": 16, "intermediate_size": 16, "depth": 1, "num_heads": 2, "out_hidden_size": HIDDEN},
    },
    "deepseek_v4": {
        "moe_intermediate_size": INTERMEDIATE,
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 1,
        "num_experts_per_tok": 3,
        "routed_scaling_factor": 1.7,
        "mlp_layer_types": ["hash_moe", "moe"],
        "swiglu_limit": 0.7,
        "head_dim": 16,
        "q_lora_rank": 8,
        "o_groups": 2,
        "o_lora_rank": 8,
        "hc_mult": 2,
        **_INDEXED,
    },
    "nemotron_h": {
        **DEEPSEEK,
        "layers_block_type": ["full_attention", "moe"],
        "moe_shared_expert_intermediate_size": 56,
        "head_dim": 16,
    },
    "minimax_m3_vl": {
        "text_config": {**BASE, **ALL, "shared_intermediate_size": 40, "dense_intermediate_size": 40, "head_dim": 16, "rotary_dim": 8},
        "vision_config": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        "projector_hidden_size": 16,
    },
    "step3p5": {
        "model_type": "step3p7",
        "text_config": {
            **BASE,
            **_SPARSE,
            "intermediate_size": 40,
            "moe_intermediate_size": INTERMEDIATE,
            "n_routed_experts": EXPERTS,
            "num_experts_per_tok": 3,
            "share_expert_dim": 40,
            "head_dim": 16,
            "swiglu_limits": [0.0, 0.7],
            "swiglu_limits_shared": [None, 0.5],
            "moe_router_scaling_factor": 1.3,
            "sliding_window": 8,
        },
        "vision_config": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    },
    "cohere2_moe": {**ALL, "num_experts": EXPERTS, "num_shared_experts": 2, "head_dim": 16},
    "kolibri1": {**MOE, "shared_expert_intermediate_size": 56, "head_dim": 16, "norm_topk_prob": True},
    "laguna": {
        **MOE,
        **_SPARSE,
        "shared_expert_intermediate_size": 56,
        "head_dim": 16,
        "moe_routed_scaling_factor": 1.3,
        "moe_router_logit_softcapping": 1.5,
    },
    "aria_text": {
        "intermediate_size": INTERMEDIATE,
        "moe_num_experts": EXPERTS,
        "moe_topk": 3,
        "moe_num_shared_experts": 2,
        "head_dim": 16,
        "mlp_bias": True,
    },
    "openai_privacy_filter": {**ALL, "head_dim": 16, "intermediate_size": 32, "swiglu_limit": 0.7},
}
