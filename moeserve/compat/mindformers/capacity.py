"""What the parameters of MindFormers' `MoEConfig` that limit experts mean here."""

from __future__ import annotations

from dataclasses import replace

from moeserve.compat.accepts import FLAG, Values, optional, real, whole
from moeserve.compat.mindformers.routers import V2
from moeserve.compat.table import OTHERWISE, Computed, Param, When, effect, gate, given, note, of, refusal


def _is_dropless(values: Values) -> bool:
    return bool(values["capacity_factor"] <= 0)


def _parts(values: Values) -> int:
    return values["comp_comm_parallel_degree"] if values["comp_comm_parallel"] else 1


_OVERLAPS = given(comp_comm_parallel=True)
_PARTS = {"batching.micro_batches": Computed(_parts, "comp_comm_parallel_degree")}
#: V2 rounds its capacity up so that it can be cut into equal parts
CAPACITY_MULTIPLE = gate(
    capacity_multiple=Computed(lambda v: v["model_parallel"] * _parts(v), "model_parallel, times comp_comm_parallel_degree if parallel")
)

CAPACITY_PARAMS = [
    Param("capacity_factor", real(), 1.1).means(
        effect("layers.gating.capacity_factor", when=When("above 0", lambda v: not _is_dropless(v))),
        effect(
            gate(capacity_factor=None),
            "nothing is dropped",
            when=When("0 or below, with V2", lambda v: V2.test(v) and _is_dropless(v), V2.beside),
            example=-1.0,
        ),
        refusal("TopkRouterV1 would drop every token", when=replace(OTHERWISE, at="0 or below, with V1"), example=0.0),
    ),
    Param("expert_group_size", optional(whole(1)), None).means(
        effect(gate(capacity_scope="request"), on=None),
        effect(gate(expert_group_size=of("expert_group_size"), capacity_scope="group"), when=OTHERWISE),
    ),
    Param("use_gmm", FLAG, False).means(
        effect(gate(drop_tokens=False), "grouped matrix products ignore the capacity; the gate is that of TopkRouterV2", on=True),
        note("experts have a capacity", on=False),
    ),
    Param("comp_comm_parallel", FLAG, False).means(
        effect(_PARTS, "one part is computed while the next is sent", on=True),
        effect(CAPACITY_MULTIPLE, on=True, when=V2),
        note("computing does not overlap sending", on=False),
    ),
    Param("comp_comm_parallel_degree", whole(1), 2).means(
        effect(_PARTS, when=_OVERLAPS),
        effect(
            CAPACITY_MULTIPLE,
            when=When("with comp_comm_parallel and V2", lambda v: V2.test(v) and _OVERLAPS.test(v), {**V2.beside, **_OVERLAPS.beside}),
        ),
        note("only comp_comm_parallel reads it", when=OTHERWISE),
    ),
]
