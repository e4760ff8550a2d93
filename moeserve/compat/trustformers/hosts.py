"""How many hosts TrustformeRS' sizes ask for, and how many layers there must be."""

from __future__ import annotations

from math import prod

from moeserve.compat.accepts import Values, optional, whole
from moeserve.compat.system import Rule
from moeserve.compat.table import Computed, Param, When, assumed, note
from moeserve.config import MAX_LAYERS

EXPERTS, PARALLELISM = "expert_parallelism", "parallelism"
_PP = f"{PARALLELISM}.pp_size"
_FACTORS = [f"{EXPERTS}.expert_parallel_size", f"{PARALLELISM}.dp_size", f"{PARALLELISM}.mp_size", _PP]

#: every stage has dp_size copies of every expert, each split over mp_size hosts, and expert_parallel_size groups of experts
NUM_HOSTS = {
    "placement.num_hosts": Computed(lambda v: prod(v[name] for name in _FACTORS), "expert_parallel_size * dp_size * mp_size * pp_size")
}

#: TrustformeRS' structs do not say how many layers there are
NUM_LAYERS = Param("num_layers", optional(whole(1)), None).means(
    assumed("not part of the original configuration; pp_size is assumed", When("with pp_size above 1", lambda v: v[_PP] > 1, {_PP: 2})),
    note(
        "as many `[[layers]]` of one kind, each with its own `seed`; at least pp_size",
        when=When("an integer", lambda v: v["num_layers"] is not None),
    ),
)


def num_layers(values: Values) -> int:
    """As many as were asked for, and at least one for each stage."""
    layers: int | None = values["num_layers"]
    return values[_PP] if layers is None else layers


NOT_TOO_MANY_LAYERS = Rule(
    lambda v: num_layers(v) > MAX_LAYERS,
    lambda v: f"{_PP if v['num_layers'] is None else 'num_layers'} is {num_layers(v)}; allowed: at most {MAX_LAYERS}",
)
AS_MANY_LAYERS_AS_STAGES = Rule(
    lambda v: num_layers(v) < v[_PP],
    lambda v: f"num_layers is {v['num_layers']}; allowed: at least {_PP} = {v[_PP]}",
)
