"""What the fields of TrustformeRS' `ParallelismConfig` mean here."""

from __future__ import annotations

from moeserve.compat.table import FLAG, Case, Param, noted, whole
from moeserve.compat.trustformers.structs import CommBackend, MemoryOptimization, PipelineSchedule
from moeserve.compat.trustformers.variants import variant, variant_of

TABLE = "parallelism"
_BACKEND, _SCHEDULE, _MEMORY = f"{TABLE}.comm_backend", f"{TABLE}.pipeline_schedule", f"{TABLE}.memory_optimization"
_FORWARD_ONLY = "orders forward and backward passes; there are only forward passes here"


def _size(name: str, one: str, more: str) -> Param:
    name = f"{TABLE}.{name}"
    return Param(
        name,
        whole(1),
        1,
        [
            Case("note", one, 1, "1", lambda values: bool(values[name] == 1)),
            Case("note", f"not supported: {more}; answers are the same", 2, "above 1", lambda values: bool(values[name] > 1)),
        ],
    )


_COMM_BACKEND = [
    variant("note", _BACKEND, "NCCL", "not supported: tokens travel through host memory, not from GPU to GPU; answers are the same"),
    variant("note", _BACKEND, "Gloo", "what is done anyway: tokens travel through host memory"),
    variant("refusal", _BACKEND, "MPI", "not supported: there is no MPI transport"),
    variant("refusal", _BACKEND, "InfiniBand", "not supported: there is no InfiniBand transport"),
]

_PIPELINE_SCHEDULE = [
    variant("note", _SCHEDULE, "GPipe", _FORWARD_ONLY),
    variant("note", _SCHEDULE, "PipeDream", _FORWARD_ONLY),
    variant("note", _SCHEDULE, "PipeDream2BW", _FORWARD_ONLY),
    variant("note", _SCHEDULE, "Interleaved1F1B", "not supported: a host is not several stages; answers are the same"),
    variant("note", _SCHEDULE, "Adaptive", "not supported: the schedule does not follow measured times; answers are the same"),
]

_MEMORY_OPTIMIZATION = [
    variant("effect", _MEMORY, "None", "experts as they are stored (`model.dtype` unset)", lambda v: {"model.dtype": None}),
    variant("effect", _MEMORY, "Low", "experts as they are stored (`model.dtype` unset)", lambda v: {"model.dtype": None}),
    variant("effect", _MEMORY, "Medium", "`model.dtype` = `bfloat16`", lambda v: {"model.dtype": "bfloat16"}),
    variant("refusal", _MEMORY, "High", "not supported: no expert is moved to host memory while it is cold"),
    variant("refusal", _MEMORY, "Extreme", "not supported: experts are not quantised to int8 nor loaded on demand"),
]

PARALLELISM_PARAMS = [
    _size("dp_size", "one copy of every expert, here and there", "an expert has one copy"),
    _size("mp_size", "an expert lives on one host as a whole, here and there", "an expert lives on one host as a whole"),
    _size("pp_size", "every host holds experts of every layer, here and there", "every host holds experts of every layer"),
    noted(
        f"{TABLE}.num_micro_batches",
        whole(1),
        4,
        2,
        "keeps the stages of a pipeline busy, of which there are none; `batching.micro_batches` cuts a batch; answers are the same",
    ),
    noted(f"{TABLE}.gradient_accumulation", FLAG, True, True, "belongs to training: no effect on inference"),
    noted(f"{TABLE}.accumulation_steps", whole(1), 1, 8, "belongs to training: no effect on inference"),
    noted(f"{TABLE}.activation_checkpointing", FLAG, True, True, "belongs to training: no effect on inference"),
    Param(_BACKEND, variant_of(CommBackend), "NCCL", _COMM_BACKEND),
    Param(_SCHEDULE, variant_of(PipelineSchedule), "GPipe", _PIPELINE_SCHEDULE),
    Param(_MEMORY, variant_of(MemoryOptimization), "Medium", _MEMORY_OPTIMIZATION),
]
