"""What the parameters of `MoeLayer`, `Experts` and the routers of ColossalAI 0.1.0 to 0.2.8 mean here."""

from __future__ import annotations

import re

from moeserve.compat.accepts import ANYTHING, FLAG, Accepts, Values, one_of, optional, real, whole
from moeserve.compat.sizes import sized_expert_extras
from moeserve.compat.system import Rule, System
from moeserve.compat.table import OTHERWISE, Computed, Param, Required, When, assumed, effect, gate, given, note, notes, of, refusal, same

_GENERATORS = one_of(None, "NormalNoiseGenerator", "UniformNoiseGenerator")
_NOISE = Accepts(f"{_GENERATORS.says}, or a function", lambda value: _GENERATORS.test(value) or callable(value), _GENERATORS.examples)
_RELEASE = re.compile(r"\d{1,4}\.\d{1,4}\.\d{1,4}")
_VERSION = Accepts(
    "a release such as '0.2.8'", lambda value: isinstance(value, str) and _RELEASE.fullmatch(value) is not None, ("0.2.8", "0.1.8")
)
_TOP1, _TOP2 = given(router="Top1Router"), given(router="Top2Router")
_TRAINING_ONLY = "noise acts in training only; in inference it has no effect in ColossalAI either"
_LAST_LEGACY = (0, 1, 10)
_LEGACY = When("0.1.0 to 0.1.10", lambda v: tuple(map(int, v["version"].split("."))) <= _LAST_LEGACY)


def _copies(values: Values) -> int:
    """As `MoeContext.get_info` decides: fewer experts than devices are there several times."""
    devices: int = values["max_ep_size"] or 1
    experts: int = values["num_experts"]
    return max(1, devices // experts)


def _does_not_divide(values: Values) -> bool:
    devices, experts = values["max_ep_size"] or 1, values["num_experts"]
    return bool(devices % experts and experts % devices)


PARAMS = [
    Param("router", one_of("Top1Router", "Top2Router"), Required).means(
        effect(gate(top_k=1, drop_policy="position"), on="Top1Router"),
        effect(gate(top_k=2, drop_policy="choice_major"), on="Top2Router"),
    ),
    same("dim_model", whole(1), Required, "layers.hidden_size"),
    same("num_experts", whole(1), Required, "layers.num_experts"),
    *notes("the capacity in training; serving uses capacity_factor_eval", Param("capacity_factor_train", real(above=0), 1.25)),
    same("capacity_factor_eval", real(above=0), 2.0, "layers.gating.capacity_factor", "rounded by `capacity_rule` = `colossalai`"),
    same("min_capacity", whole(0), 4, "layers.gating.min_capacity"),
    Param("select_policy", one_of(None, "first", "random"), None).means(
        effect(gate(drop_policy="position"), "earlier tokens are kept", on="first", when=_TOP1),
        effect(
            gate(drop_policy="random", seed=of("seed")),
            "an expert over capacity keeps tokens chosen at random, in inference too",
            on="random",
            when=_TOP1,
        ),
        refusal(
            "Top2Router has no such parameter: it serves first choices before second ones",
            when=When("with Top2Router", lambda v: v["router"] == "Top2Router" and v["select_policy"] is not None, _TOP2.beside),
        ),
    ),
    Param("noisy_func", _NOISE, None).means(note(_TRAINING_ONLY)),
    Param("eps", real(above=0), 1e-2).means(note(f"of UniformNoiseGenerator: {_TRAINING_ONLY}")),
    same("drop_tks", FLAG, True, "layers.gating.drop_tokens"),
    *notes("selects kernels and does not change answers", Param("use_kernel", FLAG, False)),
    *notes("a process group of training; `placement.num_hosts` says how many hosts share the experts", Param("ep_group", ANYTHING, None)),
    *notes(
        "modules and classes are code, which `MoeLayer.save` writes; the imported layer has experts of intermediate_size and activation",
        Param("experts", ANYTHING, None),
        Param("expert", ANYTHING, None),
        Param("expert_cls", ANYTHING, None),
    ),
    Param("expert_args", ANYTHING, None).means(note("arguments of the expert's class, which is not imported")),
    Param("max_ep_size", optional(whole(1)), None).means(
        assumed("a key of ColossalAI's launch configuration, by default the number of devices; one host is assumed"),
        effect(
            {"placement.num_hosts": of("max_ep_size"), "placement.copies": Computed(_copies, "max_ep_size / num_experts, at least 1")},
            when=OTHERWISE,
            example=8,
        ),
    ),
    Param("version", _VERSION, "0.2.8").means(
        effect(gate(capacity_rule="colossalai_legacy"), "without the factor K, even for Top2Router", when=_LEGACY),
        effect(
            gate(capacity_rule="colossalai"),
            "floor(K * factor * T / E), then up to an even number",
            when=When("0.1.11 and later", lambda v: not _LEGACY.test(v)),
            example="0.2.8",
        ),
    ),
    *sized_expert_extras("dim_model"),
]

RULES = [
    Rule(
        lambda v: v["router"] == "Top2Router" and v["num_experts"] < 2,
        lambda v: f"num_experts is {v['num_experts']}; allowed with Top2Router: 2 and more",
    ),
    Rule(
        _does_not_divide,
        lambda v: f"max_ep_size is {v['max_ep_size']}; allowed: what divides num_experts = {v['num_experts']}, or is divided by it",
    ),
]

COLOSSALAI = System(
    name="colossalai",
    params=PARAMS,
    rules=RULES,
    base=gate(aux_loss="colossalai", renormalize="none"),
    smallest={"router": "Top1Router", "dim_model": 32, "num_experts": 4},
)
