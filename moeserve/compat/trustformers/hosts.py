"""How many hosts TrustformeRS' sizes ask for, and how many layers there must be."""

from __future__ import annotations

from typing import Any

from moeserve.compat.table import Case, Param, Rule, Values, optional, whole

EXPERTS, PARALLELISM = "expert_parallelism", "parallelism"
_PP = f"{PARALLELISM}.pp_size"


def num_hosts(values: Values) -> dict[str, Any]:
    """Every stage has dp_size copies of every expert, each split over mp_size hosts, and expert_parallel_size groups of experts."""
    sizes = [values[f"{PARALLELISM}.{name}"] for name in ("dp_size", "mp_size", "pp_size")]
    return {"placement.num_hosts": values[f"{EXPERTS}.expert_parallel_size"] * sizes[0] * sizes[1] * sizes[2]}


def num_layers(values: Values) -> int:
    """As many as were asked for, and at least one for each stage."""
    given: int | None = values["num_layers"]
    return values[_PP] if given is None else given


def layers_extra() -> Param:
    """TrustformeRS' structs do not say how many layers there are."""
    return Param(
        "num_layers",
        optional(whole(1)),
        None,
        [
            Case(
                "note",
                "as many `[[layers]]` of one kind, each of a `seed` of its own; at least pp_size",
                2,
                "an integer",
                lambda v: v["num_layers"] is not None,
            ),
            Case(
                "note",
                "not part of the original configuration; pp_size is assumed",
                None,
                "not given, with pp_size above 1",
                lambda v: v["num_layers"] is None and v[_PP] > 1,
                beside={_PP: 2},
                unasked=True,
            ),
        ],
    )


AS_MANY_LAYERS_AS_STAGES = Rule(
    lambda v: num_layers(v) < v[_PP],
    lambda v: f"num_layers is {v['num_layers']}; allowed: at least {_PP} = {v[_PP]}",
)
