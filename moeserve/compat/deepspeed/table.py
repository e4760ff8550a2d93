"""What the parameters of DeepSpeed's `MoE(...)` mean here. k = experts per token."""

from __future__ import annotations

from typing import Any

from moeserve.compat.sizes import expert_extras, intermediate_size
from moeserve.compat.table import ANYTHING, FLAG, Case, Param, Required, Rule, System, Values, noted, one_of, optional, real, same, whole

_GATING = "layers.gating"
_TRAINING_ONLY = "acts in training only; in inference it has no effect there either"


def _of_k(values: Values) -> dict[str, Any]:
    """`top1gating`, `top2gating` and `topkgating`: they differ in who is dropped and in how weights are normalised."""
    k = values["k"]
    keys = {f"{_GATING}.top_k": k, f"{_GATING}.renormalize": "none" if k == 1 else "post_drop"}
    return keys if k == 1 else {**keys, f"{_GATING}.drop_policy": "choice_major" if k == 2 else "probs"}


def _drawn(key: str, value: str) -> Any:
    return lambda values: {f"{_GATING}.{key}": value, f"{_GATING}.seed": values["seed"]}


def _first(values: Values) -> dict[str, Any]:
    return {f"{_GATING}.drop_policy": "position"}


def _selects_at_random(values: Values) -> bool:
    return values["k"] == 1 and bool(values["use_rts"])


_K = [
    Case(
        "effect", f"`{_GATING}.top_k` = 1, `renormalize` = `none`: the raw probability is the weight", 1, "1", lambda v: v["k"] == 1, _of_k
    ),
    Case(
        "effect",
        f"`{_GATING}.top_k` = 2, `renormalize` = `post_drop`, `drop_policy` = `choice_major`",
        2,
        "2",
        lambda v: v["k"] == 2,
        _of_k,
    ),
    Case(
        "effect",
        f"`{_GATING}.top_k`, `renormalize` = `post_drop`, `drop_policy` = `probs`",
        3,
        "above 2",
        lambda v: v["k"] > 2,
        _of_k,
    ),
]

_USE_RTS = [
    Case(
        "effect",
        f"`{_GATING}.drop_policy` = `random`: an expert over capacity keeps tokens drawn by chance, in inference too; from `seed`",
        True,
        "true, with k = 1",
        _selects_at_random,
        _drawn("drop_policy", "random"),
    ),
    Case(
        "effect",
        f"`{_GATING}.drop_policy` = `position`: earlier tokens stay",
        False,
        "false, with k = 1",
        lambda v: v["k"] == 1 and not v["use_rts"],
        _of_k,
    ),
    Case("note", "only k = 1 selects tokens at random", True, "with k above 1", lambda v: v["k"] > 1, beside={"k": 2}),
]

_SAMPLING = [
    Case(
        "effect",
        f"`{_GATING}.noise` = `gumbel_second`: the second expert is drawn by chance, in inference too; from `seed`",
        True,
        "true, with k = 2",
        lambda v: v["k"] == 2 and bool(v["top2_2nd_expert_sampling"]),
        _drawn("noise", "gumbel_second"),
        {"k": 2},
    ),
    Case(
        "effect",
        f"`{_GATING}.noise` = `none`: the second expert is the second best",
        False,
        "false, with k = 2",
        lambda v: v["k"] == 2 and not v["top2_2nd_expert_sampling"],
        lambda v: {f"{_GATING}.noise": "none"},
        {"k": 2},
    ),
    Case("note", "only k = 2 samples", True, "with k other than 2", lambda v: v["k"] != 2),
]

_USE_RESIDUAL = [
    Case(
        "effect",
        "`layers.shared_expert` of the size of the experts, `mixing` = `residual`: both parts by a softmax of `coefficient`",
        True,
        "true",
        lambda v: bool(v["use_residual"]),
        lambda v: {
            "layers.shared_expert.intermediate_size": intermediate_size(v, "hidden_size"),
            "layers.shared_expert.mixing": "residual",
        },
    ),
    Case("note", "the layer has no residual branch, here and there", False, "false", lambda v: not v["use_residual"]),
]


def _shards(values: Values) -> int:
    """Hosts that share each expert."""
    return values["mp_size"] or 1 if values["enable_expert_tensor_parallelism"] else 1


def _hosts(values: Values) -> dict[str, Any]:
    return {"placement.num_hosts": values["ep_size"] * _shards(values), "placement.tensor_parallel": _shards(values)}


_TENSOR_PARALLEL = [
    Case(
        "effect",
        "`placement.tensor_parallel` = mp_size, `placement.num_hosts` = ep_size * mp_size",
        True,
        "true",
        lambda v: bool(v["enable_expert_tensor_parallelism"]),
        _hosts,
        {"mp_size": 2},
    ),
    Case(
        "effect",
        "`placement.tensor_parallel` = 1: an expert lives on one host as a whole",
        False,
        "false",
        lambda v: not v["enable_expert_tensor_parallelism"],
        _hosts,
        {"mp_size": 2},
    ),
]

_MP_SIZE = [
    Case(
        "effect",
        "`placement.tensor_parallel`, `placement.num_hosts` = ep_size * mp_size",
        2,
        "with enable_expert_tensor_parallelism",
        lambda v: bool(v["enable_expert_tensor_parallelism"]) and v["mp_size"] is not None,
        _hosts,
        {"enable_expert_tensor_parallelism": True},
    ),
    Case(
        "note",
        "what `mpu.get_model_parallel_world_size()` says there; not part of the original parameters, 1 is assumed",
        None,
        "not given, with enable_expert_tensor_parallelism",
        lambda v: bool(v["enable_expert_tensor_parallelism"]) and v["mp_size"] is None,
        beside={"enable_expert_tensor_parallelism": True},
        unasked=True,
    ),
    Case(
        "note", "only enable_expert_tensor_parallelism splits experts", 2, "otherwise", lambda v: not v["enable_expert_tensor_parallelism"]
    ),
]

PARAMS = [
    same("hidden_size", whole(1), Required, "layers.hidden_size", 64),
    noted(
        "expert",
        ANYTHING,
        None,
        "an nn.Module",
        "a module is code, which `MoE.save` carries; the imported layer has experts of intermediate_size and activation",
    ),
    same("num_experts", whole(1), 1, "layers.num_experts", 8),
    Param(
        "ep_size",
        whole(1),
        1,
        [
            Case(
                "effect",
                "`placement.num_hosts`: every host holds num_experts / ep_size experts",
                2,
                sets=lambda v: {"placement.num_hosts": v["ep_size"] * _shards(v)},
            )
        ],
    ),
    Param("k", whole(1), 1, _K),
    noted("capacity_factor", real(above=0), 1.0, 1.5, "the capacity in training; serving uses eval_capacity_factor"),
    same("eval_capacity_factor", real(above=0), 1.0, f"{_GATING}.capacity_factor", 2.0, "rounded by `capacity_rule` = `deepspeed`"),
    same("min_capacity", whole(0), 4, f"{_GATING}.min_capacity", 8),
    Param("use_residual", FLAG, False, _USE_RESIDUAL),
    Param(
        "noisy_gate_policy",
        one_of(None, "None", "Jitter", "RSample"),
        None,
        [
            Case("note", "no noise, here and there", "None", "null, 'None'", lambda v: v["noisy_gate_policy"] in {None, "None"}),
            Case(
                "note", f"jitter of the gate's input: {_TRAINING_ONLY}", "Jitter", "'Jitter'", lambda v: v["noisy_gate_policy"] == "Jitter"
            ),
            Case(
                "note", f"sampling of the expert: {_TRAINING_ONLY}", "RSample", "'RSample'", lambda v: v["noisy_gate_policy"] == "RSample"
            ),
        ],
    ),
    same("drop_tokens", FLAG, True, f"{_GATING}.drop_tokens", False),
    Param("use_rts", FLAG, True, _USE_RTS),
    noted("use_tutel", FLAG, False, True, "chooses kernels, not answers"),
    Param("enable_expert_tensor_parallelism", FLAG, False, _TENSOR_PARALLEL),
    Param("top2_2nd_expert_sampling", FLAG, True, _SAMPLING),
    Param("mp_size", optional(whole(1)), None, _MP_SIZE),
    *expert_extras("hidden_size"),
]

RULES = [
    Rule(lambda v: v["k"] > v["num_experts"], lambda v: f"k is {v['k']}; allowed: 1 to num_experts = {v['num_experts']}"),
    Rule(
        lambda v: v["num_experts"] % v["ep_size"] != 0,
        lambda v: f"ep_size is {v['ep_size']}; allowed: what divides num_experts = {v['num_experts']}",
    ),
]

DEEPSPEED = System(
    name="deepspeed",
    source="`deepspeed.moe.layer.MoE` of DeepSpeed 0.19.8",
    params=PARAMS,
    rules=RULES,
    base={f"{_GATING}.capacity_rule": "deepspeed", f"{_GATING}.aux_loss": "deepspeed"},
    smallest={"hidden_size": 32, "num_experts": 4},
)
