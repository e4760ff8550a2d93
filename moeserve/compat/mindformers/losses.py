"""What the parameters of MindFormers' `MoEConfig` that weigh losses mean here. An answer never depends on a loss."""

from __future__ import annotations

from typing import Any

from moeserve.compat.mindformers.routing import GATING, V2, is_v1, is_v2, not_in_v1, v2_only
from moeserve.compat.table import Accepts, Case, Param, Values, real

_LOSSES = ("expert", "device", "comm")
_LOSS_NAMES = Accepts(
    "null, or a list of 'expert', 'device', 'comm'",
    lambda value: value is None or (isinstance(value, list) and all(each in _LOSSES for each in value)),
)
_LOSS_FACTORS = Accepts(
    "null, or a list of numbers", lambda value: value is None or (isinstance(value, list) and all(real().test(each) for each in value))
)


def _losses(values: Values) -> dict[str, float]:
    return dict(zip(values["aux_loss_types"] or (), values["aux_loss_factors"] or (), strict=False))


def _expert_loss(values: Values) -> dict[str, Any]:
    return {f"{GATING}.aux_loss": "switch", f"{GATING}.aux_loss_weight": _losses(values)["expert"]}


def _has_expert_loss(values: Values) -> bool:
    return is_v2(values) and "expert" in _losses(values)


def _has_other_loss(values: Values) -> bool:
    return is_v2(values) and bool({"device", "comm"} & set(_losses(values)))


_WITH_LOSS = {**V2, "aux_loss_types": ["expert"], "aux_loss_factors": [0.1]}

LOSS_PARAMS = [
    Param(
        "aux_loss_factor",
        real(above=0, below=1),
        0.05,
        [
            Case(
                "effect",
                f"`{GATING}.aux_loss_weight`",
                0.5,
                "with V1",
                is_v1,
                lambda v: {f"{GATING}.aux_loss_weight": v["aux_loss_factor"]},
            ),
            Case("note", "TopkRouterV2 reads aux_loss_types and aux_loss_factors instead", 0.5, "with V2", is_v2, beside=V2),
        ],
    ),
    Param(
        "aux_loss_types",
        _LOSS_NAMES,
        None,
        [
            Case(
                "effect",
                f"`{GATING}.aux_loss` = `switch` for 'expert'",
                ["expert"],
                "with 'expert' and V2",
                _has_expert_loss,
                _expert_loss,
                _WITH_LOSS,
            ),
            Case(
                "note",
                "not supported: losses per device and per communication group are not reported; answers are the same",
                ["device"],
                "with 'device' or 'comm', and V2",
                _has_other_loss,
                beside=_WITH_LOSS,
            ),
            Case("note", "no loss is asked for", None, "null", lambda v: v["aux_loss_types"] is None),
            Case(
                "note",
                "TopkRouterV1 has one loss of its own; aux_loss_factor weighs it",
                ["expert"],
                "with V1",
                is_v1,
                beside={"aux_loss_factors": [0.1]},
            ),
        ],
    ),
    Param(
        "aux_loss_factors",
        _LOSS_FACTORS,
        None,
        [
            Case(
                "effect",
                f"`{GATING}.aux_loss_weight` of 'expert'",
                [0.2],
                "with 'expert' and V2",
                _has_expert_loss,
                _expert_loss,
                _WITH_LOSS,
            ),
            Case("note", "of losses that are not reported", [0.2], "otherwise", lambda v: not _has_expert_loss(v)),
        ],
    ),
    Param(
        "z_loss_factor",
        real(minimum=0),
        0.0,
        [
            v2_only(f"`{GATING}.z_loss_weight`", 0.001, lambda v: {f"{GATING}.z_loss_weight": v["z_loss_factor"]}),
            not_in_v1(0.001),
        ],
    ),
]
