"""A tiny random model of transformers for every family, and the block in it that a served layer must equal.

E experts, H hidden size, I intermediate size.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from moeserve.checkpoints.families import family_of
from tests.checkpoints.newer_settings import NEWER_SETTINGS, WRAPPERS
from tests.checkpoints.tiny_configs import ALL, BASE, DEEPSEEK, EXPERTS, HIDDEN, INTERMEDIATE, LATENT, LINEAR, LLAMA4, MAMBA, MOE

#: those whose language model is part of another
NESTED = ("llama4", "qwen3_5_moe", *WRAPPERS)

#: what AutoConfig is told besides; layer 1 is an MoE layer everywhere
SETTINGS: Mapping[str, dict[str, Any]] = {
    "mixtral": ALL,
    "minimax": {**ALL, "head_dim": 16, "block_size": 8},
    "minimax_m2": {**ALL, "head_dim": 16, "rotary_dim": 8},
    "phimoe": {**ALL, "num_experts_per_tok": 2, "router_jitter_noise": 0.1},
    "olmoe": {**ALL, "num_experts": EXPERTS, "norm_topk_prob": False},
    "flex_olmo": {**ALL, "num_experts": EXPERTS, "norm_topk_prob": True},
    "qwen2_moe": {**MOE, "shared_expert_intermediate_size": 56, "norm_topk_prob": False},
    "qwen3_moe": {**MOE, "decoder_sparse_step": 2, "head_dim": 16, "norm_topk_prob": True},
    "qwen3_next": {**MOE, **LINEAR, "shared_expert_intermediate_size": 56, "head_dim": 16},
    "qwen3_5_moe_text": {**MOE, **LINEAR, "shared_expert_intermediate_size": 56, "head_dim": 16},
    "qwen3_5_moe": {
        "text_config": {**BASE, **MOE, **LINEAR, "shared_expert_intermediate_size": 56, "head_dim": 16},
        "vision_config": {"hidden_size": 16, "intermediate_size": 16, "depth": 1, "num_heads": 2, "out_hidden_size": HIDDEN},
    },
    "afmoe": {**MOE, "num_shared_experts": 2, "num_dense_layers": 1, "head_dim": 16, "route_scale": 1.3},
    "mellum": {**MOE, "head_dim": 16, "mlp_layer_types": ["dense", "sparse"]},
    "deepseek_v2": {**DEEPSEEK, **LATENT, "topk_method": "group_limited_greedy", "norm_topk_prob": False, "mlp_bias": True},
    "deepseek_v3": {**DEEPSEEK, **LATENT},
    "deepseek_v32": {**DEEPSEEK, **LATENT, "index_n_heads": 2, "index_head_dim": 16, "mlp_layer_types": ["dense", "sparse"]},
    "glm4_moe": {**DEEPSEEK, "head_dim": 16},
    "glm4_moe_lite": {**DEEPSEEK, **LATENT, "mlp_layer_types": ["dense", "sparse"]},
    "dots1": {**DEEPSEEK, "head_dim": 16},
    "solar_open": {**DEEPSEEK, "head_dim": 16, "n_group": 1, "topk_group": 1},
    "exaone_moe": {**DEEPSEEK, "num_experts": EXPERTS, "num_shared_experts": 2, "mlp_layer_types": ["dense", "sparse"], "head_dim": 16},
    "gpt_oss": {**ALL, "head_dim": 16, "intermediate_size": 32},
    "granitemoe": ALL,
    "granitemoeshared": {**ALL, "shared_intermediate_size": 40},
    "granitemoehybrid": {**ALL, **MAMBA, "shared_intermediate_size": 40, "layer_types": ["full_attention"] * 2},
    "jamba": {**ALL, "num_experts": EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4},
    "lfm2_moe": {**MOE, "num_dense_layers": 1, "layer_types": ["full_attention"] * 2, "routed_scaling_factor": 1.3},
    "dbrx": {
        "d_model": HIDDEN,
        "n_layers": 2,
        "n_heads": 2,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"hidden_size": HIDDEN, "ffn_hidden_size": INTERMEDIATE, "moe_num_experts": EXPERTS, "moe_top_k": 3},
    },
    "llama4_text": LLAMA4,
    "llama4": {
        "text_config": {**BASE, **LLAMA4},
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
            "vision_output_dim": 16,
            "projector_input_dim": 16,
            "projector_output_dim": 16,
        },
    },
    "ernie4_5_moe": {
        "moe_intermediate_size": INTERMEDIATE,
        "intermediate_size": 40,
        "moe_num_experts": EXPERTS,
        "moe_k": 3,
        "moe_num_shared_experts": 2,
        "use_bias": True,
    },
    "hunyuan_v1_moe": {"intermediate_size": INTERMEDIATE, "num_experts": EXPERTS, "moe_topk": 3, "head_dim": 16},
    "longcat_flash": {
        **LATENT,
        "num_layers": 2,
        "ffn_hidden_size": 40,
        "expert_ffn_hidden_size": INTERMEDIATE,
        "n_routed_experts": EXPERTS,
        "zero_expert_num": 4,
        "moe_topk": 5,
    },
    **NEWER_SETTINGS,
}


def auto_class(family: str) -> Any:
    import transformers

    if family == "openai_privacy_filter":
        return transformers.AutoModelForTokenClassification
    return transformers.AutoModelForImageTextToText if family in NESTED else transformers.AutoModelForCausalLM


@cache
def tiny_model(family: str, dtype: torch.dtype = torch.float32) -> Any:
    return new_model(family, dtype)


def new_model(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A `PreTrainedModel` of random weights, whose routers tell tokens apart and whose selection biases matter."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    settings = {**({} if family in ("dbrx", *NESTED) else BASE), **SETTINGS[family], **changes}
    if "num_layers" in settings:
        del settings["num_hidden_layers"]
    config = transformers.AutoConfig.for_model(**{"model_type": family, **settings})
    torch.manual_seed(0)
    model = auto_class(family).from_config(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if (tensor.is_floating_point() and "layers.1." in name) or "blocks.1." in name:
                # Scores lie between 0 and 1, and a selection bias that dwarfs them would choose the same experts for every token.
                scale = 0.1 if "e_score_correction_bias" in name or "expert_bias" in name else 0.3
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)
            if tensor.is_floating_point():
                tensor.data = tensor.to(dtype)
            if name.endswith("tid2eid"):
                choices = torch.rand(len(tensor), EXPERTS, generator=generator).argsort(dim=1)
                tensor.copy_(choices[:, : tensor.shape[1]])
    return model


def moe_block(model: Any, family: str) -> nn.Module:
    """Its second layer's MoE block."""
    name = family_of(family).layer_name.format(index=1)
    (block,) = [module for path, module in model.named_modules() if path == name or path.endswith(name.removeprefix("model"))]
    if hasattr(block, "post_mlp_layernorm"):
        # A.X-K1's block ends with a norm that stands beside it on disk, and stays with the caller.
        block = copy.copy(block)
        block._modules = {**block._modules, "post_mlp_layernorm": nn.Identity()}
    return block


def some_tokens(num_tokens: int, dtype: torch.dtype = torch.float32, hidden_size: int = HIDDEN) -> Tensor:
    return torch.randn(num_tokens, hidden_size, generator=torch.Generator().manual_seed(num_tokens)).to(dtype)


@torch.inference_mode()
def answer_of(block: nn.Module, hidden_states: Tensor) -> Tensor:
    """[T, H] -> [T, H]; some blocks answer a tuple, of which the first counts."""
    answer = block(hidden_states[None])
    answer = answer[0] if isinstance(answer, tuple) else answer
    return answer.reshape(hidden_states.shape)
