"""What the parameters of ColossalAI's `MoeLayer`, `Experts` and routers mean here."""

from __future__ import annotations

import re
from typing import Any

from moeserve.compat.sizes import expert_extras
from moeserve.compat.table import (
    ANYTHING,
    FLAG,
    Accepts,
    Case,
    Param,
    Required,
    Rule,
    System,
    Values,
    noted,
    one_of,
    optional,
    real,
    same,
    whole,
)

_GATING = "layers.gating"
_IN_TRAINING = "noise acts in training only; in inference it has no effect there either"

_GENERATORS = one_of(None, "NormalNoiseGenerator", "UniformNoiseGenerator")
_NOISE = Accepts(f"{_GENERATORS.says}, or a function", lambda value: _GENERATORS.test(value) or callable(value))


def _top1(values: Values) -> dict[str, Any]:
    return {f"{_GATING}.top_k": 1, f"{_GATING}.drop_policy": "position"}


def _top2(values: Values) -> dict[str, Any]:
    return {f"{_GATING}.top_k": 2, f"{_GATING}.drop_policy": "choice_major"}


def _random(values: Values) -> dict[str, Any]:
    return {f"{_GATING}.drop_policy": "random", f"{_GATING}.seed": values["seed"]}


def _is_random(values: Values) -> bool:
    return bool(values["router"] == "Top1Router" and values["select_policy"] == "random")


_ROUTER = [
    Case("effect", f"`{_GATING}.top_k` = 1", "Top1Router", "'Top1Router'", lambda v: v["router"] == "Top1Router", _top1),
    Case(
        "effect",
        f"`{_GATING}.top_k` = 2, `drop_policy` = `choice_major`",
        "Top2Router",
        "'Top2Router'",
        lambda v: v["router"] == "Top2Router",
        _top2,
    ),
]

_SELECT_POLICY = [
    Case(
        "effect",
        f"`{_GATING}.drop_policy` = `position`: earlier tokens stay",
        "first",
        "'first'",
        lambda v: v["router"] == "Top1Router" and v["select_policy"] in {None, "first"},
        _top1,
    ),
    Case(
        "effect",
        f"`{_GATING}.drop_policy` = `random`: an expert over capacity keeps tokens drawn by chance, in inference too; from `seed`",
        "random",
        "'random'",
        _is_random,
        _random,
    ),
    Case(
        "refusal",
        "Top2Router has no such parameter: it serves first choices before second ones",
        "first",
        "with Top2Router",
        lambda v: v["router"] == "Top2Router" and v["select_policy"] is not None,
        beside={"router": "Top2Router"},
    ),
]

_RELEASE = re.compile(r"\d{1,4}\.\d{1,4}\.\d{1,4}")
_LAST_LEGACY = (0, 1, 10)


def _is_release(value: Any) -> bool:
    return isinstance(value, str) and _RELEASE.fullmatch(value) is not None


def _release(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def _is_legacy(values: Values) -> bool:
    return _release(values["version"]) <= _LAST_LEGACY


_VERSION = [
    Case(
        "effect",
        f"`{_GATING}.capacity_rule` = `colossalai`: floor(K * factor * T / E), then up to an even number",
        "0.2.8",
        "0.1.11 and later",
        lambda v: not _is_legacy(v),
        lambda v: {f"{_GATING}.capacity_rule": "colossalai"},
    ),
    Case(
        "effect",
        f"`{_GATING}.capacity_rule` = `colossalai_legacy`: without the factor K, even for Top2Router",
        "0.1.8",
        "0.1.0 to 0.1.10",
        _is_legacy,
        lambda v: {f"{_GATING}.capacity_rule": "colossalai_legacy"},
    ),
]


def _copies(values: Values) -> int:
    """As `MoeContext.get_info` decides: fewer experts than devices are there several times."""
    devices: int = values["max_ep_size"] or 1
    experts: int = values["num_experts"]
    return max(1, devices // experts)


_MAX_EP_SIZE = [
    Case(
        "effect",
        "`placement.num_hosts`; `placement.copies` = max_ep_size / num_experts where there are fewer experts than devices",
        8,
        "an integer",
        lambda v: v["max_ep_size"] is not None,
        lambda v: {"placement.num_hosts": v["max_ep_size"], "placement.copies": _copies(v)},
    ),
    Case(
        "note",
        "a key of the launch configuration there, by default the number of devices; one host is assumed",
        None,
        "not given",
        lambda v: v["max_ep_size"] is None,
        unasked=True,
    ),
]

PARAMS = [
    Param("router", one_of("Top1Router", "Top2Router"), Required, _ROUTER),
    same("dim_model", whole(1), Required, "layers.hidden_size", 64),
    same("num_experts", whole(1), Required, "layers.num_experts", 8),
    noted("capacity_factor_train", real(above=0), 1.25, 1.5, "the capacity in training; serving uses capacity_factor_eval"),
    same("capacity_factor_eval", real(above=0), 2.0, f"{_GATING}.capacity_factor", 1.0, "rounded by `capacity_rule` = `colossalai`"),
    same("min_capacity", whole(0), 4, f"{_GATING}.min_capacity", 8),
    Param("select_policy", one_of(None, "first", "random"), None, _SELECT_POLICY),
    noted("noisy_func", _NOISE, None, "NormalNoiseGenerator", _IN_TRAINING),
    noted("eps", real(above=0), 1e-2, 0.1, f"of UniformNoiseGenerator: {_IN_TRAINING}"),
    same("drop_tks", FLAG, True, f"{_GATING}.drop_tokens", False),
    noted("use_kernel", FLAG, False, True, "chooses kernels, not answers"),
    noted(
        "ep_group",
        ANYTHING,
        None,
        "a process group",
        "a process group of training; `placement.num_hosts` says how many hosts share the experts",
    ),
    noted(
        "experts",
        ANYTHING,
        None,
        "Experts(...)",
        "a module is code, which `MoeLayer.save` carries; the imported layer has experts of intermediate_size and activation",
    ),
    noted(
        "expert",
        ANYTHING,
        None,
        "FeedForward",
        "a class is code, which `MoeLayer.save` carries; the imported layer has experts of intermediate_size and activation",
    ),
    noted("expert_args", ANYTHING, None, {"drop_rate": 0.1}, "arguments of the expert's class, which is not imported"),
    Param("max_ep_size", optional(whole(1)), None, _MAX_EP_SIZE),
    Param("version", Accepts("a release such as '0.2.8'", _is_release), "0.2.8", _VERSION),
    *expert_extras("dim_model"),
]

RULES = [
    Rule(
        lambda v: v["router"] == "Top2Router" and v["num_experts"] < 2,
        lambda v: f"num_experts is {v['num_experts']}; allowed with Top2Router: 2 and more",
    ),
    Rule(
        lambda v: bool((v["max_ep_size"] or 1) % v["num_experts"] and v["num_experts"] % (v["max_ep_size"] or 1)),
        lambda v: f"max_ep_size is {v['max_ep_size']}; allowed: what divides num_experts = {v['num_experts']}, or is divided by it",
    ),
]

COLOSSALAI = System(
    name="colossalai",
    source="`colossalai.nn.layer.moe` of ColossalAI 0.1.0 to 0.2.8",
    params=PARAMS,
    rules=RULES,
    base={f"{_GATING}.aux_loss": "colossalai", f"{_GATING}.renormalize": "none"},
    smallest={"router": "Top1Router", "dim_model": 32, "num_experts": 4},
)
