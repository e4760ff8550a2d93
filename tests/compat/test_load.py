"""What configurations of the four systems become, written down by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import moeserve
from moeserve.compat import load
from moeserve.compat.colossalai import NormalNoiseGenerator
from moeserve.compat.mindformers import MoEConfig
from moeserve.compat.trustformers import ExpertParallelismConfig, ExpertRoutingStrategy, LoadBalancingStrategy, ParallelismConfig
from moeserve.config import GatingConfig, load_config
from moeserve.errors import ConfigError

DEEPSPEED = {"hidden_size": 64, "num_experts": 8}
COLOSSALAI = {"dim_model": 64, "num_experts": 8}
MINDFORMERS = {"expert_num": 8}


def gating(system: str, mapping: Any) -> GatingConfig:
    return load(system, mapping).config.layers[0].gating


@pytest.mark.parametrize(
    ("system", "mapping", "expected"),
    [
        (
            "deepspeed",
            DEEPSPEED,
            {"top_k": 1, "capacity_factor": 1.0, "min_capacity": 4, "capacity_rule": "deepspeed", "drop_policy": "random", "seed": 0},
        ),
        (
            "deepspeed",
            DEEPSPEED | {"use_rts": False, "eval_capacity_factor": 2.0, "capacity_factor": 9.0},
            {"drop_policy": "position", "capacity_factor": 2.0},
        ),
        (
            "deepspeed",
            DEEPSPEED | {"k": 2},
            {"top_k": 2, "drop_policy": "choice_major", "renormalize": "post_drop", "noise": "gumbel_second", "aux_loss": "deepspeed"},
        ),
        ("deepspeed", DEEPSPEED | {"k": 2, "top2_2nd_expert_sampling": False}, {"noise": "none", "seed": None}),
        ("deepspeed", DEEPSPEED | {"k": 4, "drop_tokens": False}, {"drop_policy": "probs", "noise": "none", "drop_tokens": False}),
        (
            "colossalai",
            COLOSSALAI | {"router": "Top1Router"},
            {
                "top_k": 1,
                "capacity_factor": 2.0,
                "min_capacity": 4,
                "capacity_rule": "colossalai",
                "drop_policy": "position",
                "renormalize": "none",
            },
        ),
        (
            "colossalai",
            COLOSSALAI | {"router": "Top2Router", "capacity_factor_eval": 1.5, "drop_tks": False},
            {
                "top_k": 2,
                "capacity_factor": 1.5,
                "drop_policy": "choice_major",
                "drop_tokens": False,
                "renormalize": "none",
                "noise": "none",
            },
        ),
        ("colossalai", COLOSSALAI | {"router": "Top1Router", "select_policy": "random", "seed": 3}, {"drop_policy": "random", "seed": 3}),
        (
            "mindformers",
            MINDFORMERS | {"num_experts_chosen": 2},
            {
                "top_k": 2,
                "routing": "mindformers",
                "capacity_rule": "mindformers",
                "capacity_factor": 1.1,
                "renormalize": "post_drop",
                "renormalize_eps": 1e-9,
                "aux_loss": "mindformers",
                "aux_loss_weight": 0.05,
            },
        ),
        ("mindformers", MINDFORMERS | {"expert_group_size": 16}, {"capacity_scope": "group", "expert_group_size": 16}),
        (
            "mindformers",
            MINDFORMERS
            | {
                "num_experts_chosen": 2,
                "routing_policy": "TopkRouterV2",
                "use_gating_sigmoid": True,
                "topk_method": "noaux_tc",
                "n_group": 4,
                "topk_group": 2,
                "routed_scaling_factor": 2.5,
                "capacity_factor": -1.0,
            },
            {
                "scoring_func": "sigmoid",
                "num_expert_groups": 4,
                "topk_groups": 2,
                "group_score": "top2_sum",
                "routed_scaling_factor": 2.5,
                "renormalize": "pre_drop",
                "capacity_factor": None,
                "capacity_rule": "mindformers_v2",
                "drop_policy": "choice_major",
            },
        ),
        (
            "mindformers",
            MINDFORMERS
            | {"routing_policy": "TopkRouterV2", "comp_comm_parallel": True, "comp_comm_parallel_degree": 4, "enable_sdrop": True},
            {"capacity_multiple": 4, "drop_policy": "position"},
        ),
        (
            "trustformers",
            {},
            {
                "top_k": 2,
                "capacity_factor": 1.25,
                "capacity_rule": "trustformers",
                "drop_tokens": False,
                "aux_loss_weight": 0.01,
                "routing": "learned",
            },
        ),
        (
            "trustformers",
            {"expert_parallelism": {"load_balancing": "ExpertChoiceBased"}},
            {"routing": "expert_choice", "drop_tokens": True, "renormalize": "none"},
        ),
        (
            "trustformers",
            {"expert_parallelism": {"routing_strategy": "HashBased", "drop_tokens": True}},
            {"routing": "hash", "drop_tokens": True},
        ),
        ("trustformers", {"expert_parallelism": {"routing_strategy": "Random"}, "seed": 5}, {"routing": "random", "seed": 5}),
    ],
)
def test_gating(system: str, mapping: dict[str, Any], expected: dict[str, Any]) -> None:
    found = gating(system, mapping)
    assert {key: getattr(found, key) for key in expected} == expected


def test_sizes_and_placement() -> None:
    deepspeed = load("deepspeed", DEEPSPEED | {"ep_size": 4, "intermediate_size": 96, "activation": "gelu", "bias": True}).config
    layer = deepspeed.layers[0]
    assert (layer.hidden_size, layer.intermediate_size, layer.num_experts, layer.activation, layer.bias) == (64, 96, 8, "gelu", True)
    assert deepspeed.placement.num_hosts == 4
    trustformers = load("trustformers", {"hidden_size": 32, "parallelism": {"memory_optimization": "Low"}}).config
    assert (trustformers.placement.num_hosts, trustformers.model.dtype) == (4, None)
    assert (trustformers.layers[0].hidden_size, trustformers.layers[0].intermediate_size) == (32, 128)
    assert load("trustformers", {}).config.model.dtype == "bfloat16"
    extreme = load("trustformers", {"parallelism": {"memory_optimization": "Extreme"}}).config.model
    assert (extreme.quantization, extreme.dtype) == ("int8", "bfloat16")
    assert load("mindformers", MINDFORMERS).config.layers[0].intermediate_size == 1407


@pytest.mark.parametrize(
    ("system", "mapping", "expected"),
    [
        ("deepspeed", DEEPSPEED | {"ep_size": 2, "mp_size": 2}, {"num_hosts": 2, "tensor_parallel": 1}),
        (
            "deepspeed",
            DEEPSPEED | {"ep_size": 2, "mp_size": 2, "enable_expert_tensor_parallelism": True},
            {"num_hosts": 4, "tensor_parallel": 2},
        ),
        ("colossalai", COLOSSALAI | {"router": "Top1Router", "max_ep_size": 4}, {"num_hosts": 4, "copies": 1}),
        ("colossalai", COLOSSALAI | {"router": "Top1Router", "max_ep_size": 16}, {"num_hosts": 16, "copies": 2}),
        ("mindformers", MINDFORMERS | {"expert_parallel": 4, "model_parallel": 2}, {"num_hosts": 8, "tensor_parallel": 2}),
        (
            "mindformers",
            MINDFORMERS | {"expert_parallel": 4, "model_parallel": 4, "expert_model_parallel": 1},
            {"num_hosts": 4, "tensor_parallel": 1},
        ),
        (
            "trustformers",
            {"parallelism": {"dp_size": 2, "mp_size": 3, "pp_size": 2}},
            {"num_hosts": 48, "copies": 2, "tensor_parallel": 3, "pipeline_stages": 2},
        ),
        ("trustformers", {"expert_parallelism": {"load_balancing": "RoundRobin"}}, {"copy_choice": "round_robin"}),
    ],
)
def test_placement(system: str, mapping: dict[str, Any], expected: dict[str, Any]) -> None:
    placement = load(system, mapping).config.placement
    assert {key: getattr(placement, key) for key in expected} == expected


def test_shared_experts() -> None:
    shared = load("deepspeed", DEEPSPEED | {"use_residual": True, "intermediate_size": 96}).config.layers[0].shared_expert
    assert shared is not None and (shared.intermediate_size, shared.mixing) == (96, "residual")
    mapping = MINDFORMERS | {"shared_expert_num": 2, "moe_intermediate_size": 10}
    for gated, mixing in ((False, "add"), (True, "sigmoid")):
        shared = load("mindformers", mapping | {"use_shared_expert_gating": gated}).config.layers[0].shared_expert
        assert shared is not None and (shared.intermediate_size, shared.mixing) == (20, mixing)


def test_communication() -> None:
    config = load("mindformers", MINDFORMERS | {"group_wise_a2a": True, "comp_comm_parallel": True, "comp_comm_parallel_degree": 3}).config
    assert (config.communication.pattern, config.batching.micro_batches) == ("hierarchical", 3)
    config = load("trustformers", {"expert_parallelism": {"communication_pattern": "Ring"}}).config
    assert (config.communication.pattern, config.batching.micro_batches) == ("ring", 4)


def test_capacity_of_old_releases_of_colossalai() -> None:
    logits = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    mapping = COLOSSALAI | {"router": "Top2Router", "capacity_factor_eval": 1.0, "min_capacity": 0}
    by_version = {version: moeserve.route(logits, gating("colossalai", mapping | {"version": version})) for version in ("0.1.10", "0.1.11")}
    # floor(100 / 8) and floor(2 * 100 / 8), each up to an even number
    assert {version: routing.capacity for version, routing in by_version.items()} == {"0.1.10": 12, "0.1.11": 26}


def test_assumed_sizes_are_noted() -> None:
    assert [note.field for note in load("mindformers", MINDFORMERS).notes] == ["hidden_size"]
    assert [note.field for note in load("deepspeed", DEEPSPEED).notes] == ["intermediate_size"]
    assert not load("deepspeed", DEEPSPEED | {"intermediate_size": 8}).notes


@pytest.mark.parametrize(
    ("system", "mapping", "sentence"),
    [
        ("megatron", {}, "'megatron' is not a system configurations can be imported from; allowed: deepspeed, colossalai"),
        ("deepspeed", {"num_experts": 4}, "deepspeed: hidden_size is required"),
        ("deepspeed", DEEPSPEED | {"k": 9}, "deepspeed: k is 9; allowed: 1 to num_experts = 8"),
        ("deepspeed", DEEPSPEED | {"k": True}, "deepspeed: k is True; allowed: an integer of at least 1"),
        ("deepspeed", DEEPSPEED | {"ep_size": 3}, "deepspeed: ep_size is 3; allowed: what divides num_experts = 8"),
        ("deepspeed", DEEPSPEED | {"noisy_gate_policy": "jitter"}, "allowed: null, 'None', 'Jitter', 'RSample'"),
        ("deepspeed", [1], r"deepspeed is \[1\]; allowed: a mapping"),
        ("colossalai", COLOSSALAI, "colossalai: router is required; allowed: 'Top1Router', 'Top2Router'"),
        ("mindformers", MINDFORMERS | {"num_experts_chosen": 9}, "num_experts_chosen is 9; allowed: 1 to expert_num = 8"),
        ("mindformers", MINDFORMERS | {"routing_policy": "TopkRouterV2", "topk_method": "noaux_tc"}, "needs n_group and topk_group"),
        ("mindformers", MINDFORMERS | {"aux_loss_types": ["expert"]}, "aux_loss_factors is None; allowed: one number for each"),
        ("mindformers", MINDFORMERS | {"expert_parallel": 3}, "expert_parallel is 3; allowed: what divides expert_num = 8"),
        (
            "colossalai",
            COLOSSALAI | {"router": "Top1Router", "max_ep_size": 12},
            "max_ep_size is 12; allowed: what divides num_experts = 8, or is divided by it",
        ),
        ("colossalai", COLOSSALAI | {"router": "Top1Router", "version": "newest"}, "version is 'newest'; allowed: a release such as"),
        ("trustformers", {"expert_parallelism": {"num_experts": 16}}, "experts_per_device is 2; allowed: .* = 4"),
        ("trustformers", {"expert_parallelism": {"routing_strategy": "Learned"}}, "allowed: LearnedGating, HashBased"),
        ("trustformers", {"parallelism": {"comm_backend": "MPI"}}, "comm_backend = 'MPI' is refused"),
        ("trustformers", {"parallelism": {"pp_size": 4}, "num_layers": 3}, "num_layers is 3; allowed: at least parallelism.pp_size = 4"),
        ("trustformers", {"parallelism": {"pp_size": 10**8}}, "parallelism.pp_size is 100000000; allowed: at most 4096"),
        ("trustformers", {"num_layers": 10**8}, "num_layers is 100000000; allowed: at most 4096"),
        (
            "deepspeed",
            DEEPSPEED | {"eval_capacity_factor": 10**400},
            "factor is an integer of 1329 bits; allowed: at most 64",
        ),
        ("deepspeed", {"hidden_size": 1 << 20_000}, "hidden_size is an integer of 20001 bits; allowed: at most 64"),
        ("deepspeed", {"layers": 1 << 20_000}, r"'layers' is not a parameter \(got a number of too many digits\)"),
        ("mindformers", MINDFORMERS | {"aux_loss_types": ["expert"], "aux_loss_factors": [10**400]}, "allowed: null, or a list of numbers"),
        (
            "mindformers",
            MINDFORMERS | {"routing_policy": "TopkRouterV2", "topk_method": "noaux_tc", "n_group": 8, "topk_group": 2},
            "n_group is 8; allowed with 'noaux_tc': groups of two experts and more",
        ),
        ("trustformers", {"parallelism": 3}, "trustformers: parallelism is 3; allowed: a mapping"),
    ],
)
def test_mistakes_are_one_sentence(system: str, mapping: Any, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as error:
        load(system, mapping)
    assert "\n" not in str(error.value)


def test_configuration_objects_are_taken_as_they_are() -> None:
    config = MoEConfig(expert_num=8, num_experts_chosen=2, update_step=5)
    assert load("mindformers", config) == load("mindformers", config.to_diff_dict())
    assert config.to_dict()["capacity_factor"] == 1.1
    with pytest.raises(ConfigError, match=r"cold_token_percent is 2\.0; allowed: a number above 0 and of at most 1"):
        MoEConfig(cold_token_percent=2.0)
    experts = ExpertParallelismConfig(routing_strategy=ExpertRoutingStrategy.HashBased, load_balancing=LoadBalancingStrategy.LoadAware)
    imported = load("trustformers", {"expert_parallelism": experts, "parallelism": ParallelismConfig(pp_size=2)})
    assert imported.config.layers[0].gating.routing == "hash"
    assert [note.field for note in imported.notes] == ["num_layers", "hidden_size", "intermediate_size"]
    assert len(imported.config.layers) == 2 and len({layer.seed for layer in imported.config.layers}) == 2


def test_an_imported_configuration_routes_as_the_original() -> None:
    logits = torch.randn(25, 2, generator=torch.Generator().manual_seed(0))
    mapping = {"hidden_size": 64, "num_experts": 2, "eval_capacity_factor": 1.2, "min_capacity": 0}
    assert moeserve.route(logits, gating("deepspeed", mapping)).capacity == 16


def test_a_noise_generator_is_taken_as_it_is() -> None:
    imported = load("colossalai", COLOSSALAI | {"router": "Top1Router", "noisy_func": NormalNoiseGenerator(8), "intermediate_size": 8})
    assert [note.field for note in imported.notes] == ["noisy_func", "max_ep_size"]


def test_it_is_a_whole_service_configuration() -> None:
    config = load("colossalai", COLOSSALAI | {"router": "Top2Router"}).config
    assert load_config(config.model_dump(exclude_unset=True)) == config
    layer = moeserve.MoELayer(hidden_size=64, intermediate_size=256, num_experts=8, gating=config.layers[0].gating)
    assert layer(torch.ones(3, 64)).shape == (3, 64)
