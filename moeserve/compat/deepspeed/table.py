"""What the parameters of `deepspeed.moe.layer.MoE` of DeepSpeed 0.19.8 mean here. k = experts per token.

`top1gating`, `top2gating` and `topkgating` differ in which tokens are dropped and in how weights are normalized.
"""

from __future__ import annotations

from moeserve.compat.accepts import ANYTHING, FLAG, Values, one_of, optional, real, whole
from moeserve.compat.sizes import intermediate_size, sized_expert_extras
from moeserve.compat.system import System, at_most, divides
from moeserve.compat.table import (
    OTHERWISE,
    Computed,
    Param,
    Required,
    When,
    assumed,
    effect,
    gate,
    given,
    note,
    notes,
    of,
    same,
    shown_with,
)

_TRAINING_ONLY = "acts in training only; in inference it has no effect in DeepSpeed either"


def _shards(values: Values) -> int:
    """Hosts that share each expert."""
    return values["mp_size"] or 1 if values["enable_expert_tensor_parallelism"] else 1


_NUM_HOSTS = Computed(lambda v: v["ep_size"] * _shards(v))
_SPLIT = {
    "placement.tensor_parallel": Computed(_shards, "mp_size"),
    "placement.num_hosts": Computed(_NUM_HOSTS.of, "ep_size * mp_size"),
}
_RESIDUAL = {
    "layers.shared_expert.intermediate_size": Computed(lambda v: intermediate_size(v, "hidden_size")),
    "layers.shared_expert.mixing": "residual",
}
_WITH_SPLIT = given(enable_expert_tensor_parallelism=True)

PARAMS = [
    same("hidden_size", whole(1), Required, "layers.hidden_size"),
    *notes(
        "a module is code, which `MoE.save` writes; the imported layer has experts of intermediate_size and activation",
        Param("expert", ANYTHING, None),
    ),
    same("num_experts", whole(1), 1, "layers.num_experts"),
    Param("ep_size", whole(1), 1).means(effect({"placement.num_hosts": _NUM_HOSTS}, "every host holds num_experts / ep_size experts")),
    Param("k", whole(1), 1).means(
        effect(gate(top_k=1, renormalize="none"), "the raw probability is the weight", on=1),
        effect(gate(top_k=2, renormalize="post_drop", drop_policy="choice_major"), on=2),
        effect(gate(top_k=of("k"), renormalize="post_drop", drop_policy="probs"), when=When("above 2", lambda v: v["k"] > 2), example=3),
    ),
    *notes("the capacity in training; serving uses eval_capacity_factor", Param("capacity_factor", real(above=0), 1.0)),
    same("eval_capacity_factor", real(above=0), 1.0, "layers.gating.capacity_factor", "rounded by `capacity_rule` = `deepspeed`"),
    same("min_capacity", whole(0), 4, "layers.gating.min_capacity"),
    Param("use_residual", FLAG, False).means(
        effect(_RESIDUAL, "as large as an expert; `coefficient` weighs both parts by a softmax", on=True),
        note("the layer has no residual branch", on=False),
    ),
    Param("noisy_gate_policy", one_of(None, "None", "Jitter", "RSample"), None).means(
        note(f"jitter of the gate's input {_TRAINING_ONLY}", on="Jitter"),
        note(f"sampling of the expert {_TRAINING_ONLY}", on="RSample"),
        note("there is no noise", when=OTHERWISE, example="None"),
    ),
    same("drop_tokens", FLAG, True, "layers.gating.drop_tokens"),
    Param("use_rts", FLAG, True).means(
        effect(
            gate(drop_policy="random", seed=of("seed")),
            "an expert over capacity keeps tokens chosen at random, in inference too",
            on=True,
            when=given(k=1),
        ),
        effect(gate(drop_policy="position"), "earlier tokens are kept", on=False, when=given(k=1)),
        note("only k = 1 selects tokens at random", when=When("with k above 1", lambda v: v["k"] > 1, {"k": 2})),
    ),
    *notes("selects kernels and does not change answers", Param("use_tutel", FLAG, False)),
    Param("enable_expert_tensor_parallelism", FLAG, False).means(
        effect(_SPLIT, on=True, when=shown_with(mp_size=2)),
        effect({"placement.tensor_parallel": 1, "placement.num_hosts": of("ep_size")}, on=False, when=shown_with(mp_size=2)),
    ),
    Param("top2_2nd_expert_sampling", FLAG, True).means(
        effect(
            gate(noise="gumbel_second", seed=of("seed")),
            "the second expert is chosen at random, in inference too",
            on=True,
            when=given(k=2),
        ),
        effect(gate(noise="none"), "the second expert is the second best", on=False, when=given(k=2)),
        note("only k = 2 samples", when=OTHERWISE),
    ),
    Param("mp_size", optional(whole(1)), None).means(
        effect(_SPLIT, when=_WITH_SPLIT),
        assumed("DeepSpeed asks `mpu.get_model_parallel_world_size()`; here 1 is assumed", _WITH_SPLIT),
        note("only enable_expert_tensor_parallelism splits experts", when=OTHERWISE),
    ),
    *sized_expert_extras("hidden_size"),
]

DEEPSPEED = System(
    name="deepspeed",
    params=PARAMS,
    rules=[at_most("k", "num_experts"), divides("ep_size", "num_experts")],
    base=gate(capacity_rule="deepspeed", aux_loss="deepspeed"),
    smallest={"hidden_size": 32, "num_experts": 4},
)
