"""What the fields of TrustformeRS' `ParallelismConfig` mean here."""

from __future__ import annotations

from moeserve.compat.table import FLAG, Case, Param, noted, same, whole
from moeserve.compat.trustformers.hosts import PARALLELISM, num_hosts
from moeserve.compat.trustformers.structs import CommBackend, MemoryOptimization, PipelineSchedule
from moeserve.compat.trustformers.variants import variant, variant_of

TABLE = PARALLELISM
_BACKEND, _SCHEDULE, _MEMORY = f"{TABLE}.comm_backend", f"{TABLE}.pipeline_schedule", f"{TABLE}.memory_optimization"
_FORWARD_ONLY = "orders forward and backward passes; there are only forward passes here"


def _size(name: str, key: str, says: str) -> Param:
    name = f"{TABLE}.{name}"
    says = f"`placement.{key}`: {says}; `placement.num_hosts` times as many"
    effect = Case("effect", says, 2, sets=lambda values: {f"placement.{key}": values[name], **num_hosts(values)})
    return Param(name, whole(1), 1, [effect])


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
    variant("note", _SCHEDULE, "Interleaved1F1B", "not supported: a host belongs to one stage; answers are the same"),
    variant("note", _SCHEDULE, "Adaptive", "not supported: the schedule does not follow measured times; answers are the same"),
]

_MEMORY_OPTIMIZATION = [
    variant("effect", _MEMORY, "None", "experts as they are stored (`model.dtype` unset)", lambda v: {"model.dtype": None}),
    variant("effect", _MEMORY, "Low", "experts as they are stored (`model.dtype` unset)", lambda v: {"model.dtype": None}),
    variant("effect", _MEMORY, "Medium", "`model.dtype` = `bfloat16`", lambda v: {"model.dtype": "bfloat16"}),
    variant(
        "effect",
        _MEMORY,
        "High",
        "`placement.gpus_per_host` = 0, `model.dtype` = `bfloat16`: all experts, not only the cold ones, are in pageable host memory",
        lambda v: {"placement.gpus_per_host": 0.0, "model.dtype": "bfloat16"},
    ),
    variant(
        "effect",
        _MEMORY,
        "Extreme",
        "`model.quantization` = `int8`, `model.dtype` = `bfloat16` for the rest; all experts are loaded, none on demand",
        lambda v: {"model.quantization": "int8", "model.dtype": "bfloat16"},
    ),
]

PARALLELISM_PARAMS = [
    _size("dp_size", "copies", "as many copies of every expert"),
    _size("mp_size", "tensor_parallel", "every expert is split over as many hosts"),
    _size("pp_size", "pipeline_stages", "the layers stand on as many groups of hosts"),
    same(f"{TABLE}.num_micro_batches", whole(1), 4, "batching.micro_batches", 2),
    noted(f"{TABLE}.gradient_accumulation", FLAG, True, True, "belongs to training: no effect on inference"),
    noted(f"{TABLE}.accumulation_steps", whole(1), 1, 8, "belongs to training: no effect on inference"),
    noted(f"{TABLE}.activation_checkpointing", FLAG, True, True, "belongs to training: no effect on inference"),
    Param(_BACKEND, variant_of(CommBackend), "NCCL", _COMM_BACKEND),
    Param(_SCHEDULE, variant_of(PipelineSchedule), "GPipe", _PIPELINE_SCHEDULE),
    Param(_MEMORY, variant_of(MemoryOptimization), "Medium", _MEMORY_OPTIMIZATION),
]
