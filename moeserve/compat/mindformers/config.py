"""MindFormers' `MoEConfig`, with its parameters and defaults."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from moeserve.compat.mindformers.table import MINDFORMERS
from moeserve.compat.walk import changed, complete


@dataclass
class MoEConfig:
    """The configuration of a MindFormers MoE layer; moeserve.compat.load("mindformers", ...) takes it as it is.

    Raises ConfigError for what the original refuses.
    """

    expert_num: int = 1
    capacity_factor: float = 1.1
    aux_loss_factor: float = 0.05
    num_experts_chosen: int = 1
    expert_group_size: int | None = None
    group_wise_a2a: bool = False
    comp_comm_parallel: bool = False
    comp_comm_parallel_degree: int = 2
    save_token_distribution: bool = False
    cur_layer: int = 0
    enable_cold_hot_expert: bool = False
    update_step: int = 10000
    hot_expert_num: int = 0
    cold_token_percent: float = 1.0
    moe_module_name: str = ""
    routing_policy: str = "TopkRouterV1"
    norm_topk_prob: bool = True
    enable_sdrop: bool = False
    use_fused_ops_topkrouter: bool = False
    router_dense_type: str = "float32"
    shared_expert_num: int = 0
    use_shared_expert_gating: bool = False
    max_router_load: int = 128 * 1024
    topk_method: str = "greedy"
    topk_group: int | None = None
    n_group: int | None = None
    first_k_dense_replace: bool | int = True
    moe_intermediate_size: int = 1407
    routed_scaling_factor: float = 1.0
    aux_loss_types: list[str] | None = None
    aux_loss_factors: list[float] | None = None
    z_loss_factor: float = 0.0
    balance_via_topk_bias: bool = False
    topk_bias_update_rate: float = 0.0
    use_allgather_dispatcher: bool = False
    moe_shared_expert_overlap: bool = False
    expert_model_parallel: int | None = None
    use_gating_sigmoid: bool = False
    enable_deredundency: bool = False
    npu_nums_per_device: int = 1
    use_gmm: bool = False
    enable_gmm_safe_tokens: bool = False
    use_fused_ops_permute: bool = False
    callback_moe_droprate: bool = False
    moe_init_method_std: float = 0.01

    def __post_init__(self) -> None:
        complete(MINDFORMERS, asdict(self))

    def to_dict(self) -> dict[str, Any]:
        """Every parameter by name."""
        return asdict(self)

    def to_diff_dict(self) -> dict[str, Any]:
        """The parameters that are not at their default."""
        return changed(self)
