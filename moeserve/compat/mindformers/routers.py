"""The two routers of MindFormers, V1 and V2. `use_gmm` has a gate of its own, which is that of V2 without a capacity."""

from __future__ import annotations

from moeserve.compat.accepts import Values
from moeserve.compat.table import When, note

_V2 = {"routing_policy": "TopkRouterV2"}
IN_GROUPS = {**_V2, "n_group": 4, "topk_group": 2}


def _is_v1(values: Values) -> bool:
    return bool(values["routing_policy"] == "TopkRouterV1" and not values["use_gmm"])


def has_groups(values: Values) -> bool:
    """Whether tokens choose inside groups of experts."""
    return not _is_v1(values) and values["topk_method"] != "greedy"


V1 = When("with V1", _is_v1)
V2 = When("with V2", lambda v: not _is_v1(v), _V2)
V2_WITH_GROUPS = When("with V2 and a topk_method with groups", has_groups, {**IN_GROUPS, "topk_method": "noaux_tc"})
IGNORED_BY_V1 = note("only TopkRouterV2 reads it", when=V1)
