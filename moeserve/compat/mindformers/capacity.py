"""What the parameters of MindFormers' `MoEConfig` that limit experts mean here."""

from __future__ import annotations

from typing import Any

from moeserve.compat.mindformers.routing import GATING, V2, is_v1, is_v2, v2_only
from moeserve.compat.table import FLAG, Case, Param, Values, optional, real, whole


def _is_dropless(values: Values) -> bool:
    return bool(values["capacity_factor"] <= 0)


def _overlaps(values: Values) -> bool:
    return bool(values["comp_comm_parallel"])


def _degree(values: Values) -> int:
    return values["comp_comm_parallel_degree"] if _overlaps(values) else 1


def capacity_multiple(values: Values) -> dict[str, Any]:
    """V2 rounds its capacity up so that it can be cut into equal parts."""
    return {f"{GATING}.capacity_multiple": values["model_parallel"] * _degree(values)}


def _micro_batches(values: Values) -> dict[str, Any]:
    return {"batching.micro_batches": _degree(values)}


def _rounds(values: Values) -> bool:
    return is_v2(values) and _overlaps(values)


_CAPACITY = Param(
    "capacity_factor",
    real(),
    1.1,
    [
        Case(
            "effect",
            f"`{GATING}.capacity_factor`",
            2.0,
            "above 0",
            lambda v: not _is_dropless(v),
            lambda v: {f"{GATING}.capacity_factor": v["capacity_factor"]},
        ),
        v2_only(
            f"`{GATING}.capacity_factor` unset: nothing is dropped",
            -1.0,
            lambda v: {f"{GATING}.capacity_factor": None},
            "0 or below",
            _is_dropless,
        ),
        Case("refusal", "TopkRouterV1 would drop every token", 0.0, "0 or below, with V1", lambda v: is_v1(v) and _is_dropless(v)),
    ],
)

_GROUP_SIZE = Param(
    "expert_group_size",
    optional(whole(1)),
    None,
    [
        Case(
            "effect",
            f"`{GATING}.expert_group_size`, `capacity_scope` = `group`",
            64,
            "an integer",
            lambda v: v["expert_group_size"] is not None,
            lambda v: {f"{GATING}.expert_group_size": v["expert_group_size"], f"{GATING}.capacity_scope": "group"},
        ),
        Case(
            "effect",
            f"`{GATING}.capacity_scope` = `request`",
            None,
            "null",
            lambda v: v["expert_group_size"] is None,
            lambda v: {f"{GATING}.capacity_scope": "request"},
        ),
    ],
)

_USE_GMM = Param(
    "use_gmm",
    FLAG,
    False,
    [
        Case(
            "effect",
            f"`{GATING}.drop_tokens` = false, and the gate of TopkRouterV2: grouped matrix products ignore the capacity",
            True,
            "true",
            lambda v: v["use_gmm"],
            lambda v: {f"{GATING}.drop_tokens": False},
        ),
        Case("note", "experts with a capacity, here and there", False, "false", lambda v: not v["use_gmm"]),
    ],
)

_OVERLAP_PARAMS = [
    Param(
        "comp_comm_parallel",
        FLAG,
        False,
        [
            Case(
                "effect",
                "`batching.micro_batches` = comp_comm_parallel_degree: one part is computed while the next is sent",
                True,
                "true",
                _overlaps,
                _micro_batches,
            ),
            v2_only(
                f"`{GATING}.capacity_multiple` = comp_comm_parallel_degree * model_parallel: the capacity is rounded up to a multiple",
                True,
                capacity_multiple,
                "true",
                _overlaps,
            ),
            Case("note", "computing does not overlap sending, here and there", False, "false", lambda v: not _overlaps(v)),
        ],
    ),
    Param(
        "comp_comm_parallel_degree",
        whole(1),
        2,
        [
            Case(
                "effect",
                "`batching.micro_batches`",
                4,
                "with comp_comm_parallel",
                _overlaps,
                _micro_batches,
                {"comp_comm_parallel": True},
            ),
            Case(
                "effect",
                f"`{GATING}.capacity_multiple`, times model_parallel",
                4,
                "with comp_comm_parallel and V2",
                _rounds,
                capacity_multiple,
                {**V2, "comp_comm_parallel": True},
            ),
            Case("note", "only comp_comm_parallel reads it", 4, "otherwise", lambda v: not _overlaps(v)),
        ],
    ),
]

CAPACITY_PARAMS = [_CAPACITY, _GROUP_SIZE, _USE_GMM, *_OVERLAP_PARAMS]
