"""What the parameters of MindFormers' `MoEConfig` that weigh losses mean here. An answer never depends on a loss."""

from __future__ import annotations

from moeserve.compat.accepts import Accepts, Values, real
from moeserve.compat.mindformers.routers import IGNORED_BY_V1, V1, V2
from moeserve.compat.table import OTHERWISE, Computed, Param, When, effect, gate, note

_LOSSES = ("expert", "device", "comm")
_TYPES = Accepts(
    "null, or a list of 'expert', 'device', 'comm'",
    lambda value: value is None or (isinstance(value, list) and all(each in _LOSSES for each in value)),
    (["expert"], ["device"]),
)
_FACTORS = Accepts(
    "null, or a list of numbers",
    lambda value: value is None or (isinstance(value, list) and all(real().test(each) for each in value)),
    ([0.2], [0.5]),
)
_SHOWN_BY = {**V2.beside, "aux_loss_types": ["expert"], "aux_loss_factors": [0.1]}


def _factors(values: Values) -> dict[str, float]:
    return dict(zip(values["aux_loss_types"] or (), values["aux_loss_factors"] or (), strict=False))


_EXPERT = When("with 'expert' and V2", lambda v: V2.test(v) and "expert" in _factors(v), _SHOWN_BY)
_OTHERS = When("with 'device' or 'comm', and V2", lambda v: V2.test(v) and bool({"device", "comm"} & set(_factors(v))), _SHOWN_BY)
_EXPERT_LOSS = gate(aux_loss="switch", aux_loss_weight=Computed(lambda v: _factors(v)["expert"], "the factor of 'expert'"))

LOSS_PARAMS = [
    Param("aux_loss_factor", real(above=0, below=1), 0.05).means(
        effect("layers.gating.aux_loss_weight", when=V1),
        note("TopkRouterV2 reads aux_loss_types and aux_loss_factors instead", when=V2),
    ),
    Param("aux_loss_types", _TYPES, None).means(
        effect(_EXPERT_LOSS, when=_EXPERT),
        note(
            "not supported: losses per device and per communication group are not reported; answers are the same",
            when=_OTHERS,
            example=["device"],
        ),
        note("no loss is asked for", on=None),
        note(
            "TopkRouterV1 has one loss of its own; aux_loss_factor weighs it",
            when=When(V1.at, V1.test, {"aux_loss_factors": [0.1]}),
        ),
    ),
    Param("aux_loss_factors", _FACTORS, None).means(
        effect(_EXPERT_LOSS, when=_EXPERT), note("weighs losses that are not reported", when=OTHERWISE)
    ),
    Param("z_loss_factor", real(minimum=0), 0.0).means(effect("layers.gating.z_loss_weight", when=V2), IGNORED_BY_V1),
]
