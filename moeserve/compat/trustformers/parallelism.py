"""What the fields of TrustformeRS' `ParallelismConfig` mean here."""

from __future__ import annotations

from moeserve.compat.accepts import FLAG, variant_of, whole
from moeserve.compat.table import Param, effect, note, notes, of, refusal, same
from moeserve.compat.trustformers.hosts import NUM_HOSTS, PARALLELISM
from moeserve.compat.trustformers.structs import CommBackend, MemoryOptimization, PipelineSchedule

_FORWARD_ONLY = "orders forward and backward passes; there are only forward passes here"


def _size(name: str, key: str, why: str) -> Param:
    name = f"{PARALLELISM}.{name}"
    return Param(name, whole(1), 1).means(effect({f"placement.{key}": of(name), **NUM_HOSTS}, why))


PARALLELISM_PARAMS = [
    _size("dp_size", "copies", "every expert has as many copies"),
    _size("mp_size", "tensor_parallel", "every expert is split over as many hosts"),
    _size("pp_size", "pipeline_stages", "the layers are split over as many groups of hosts"),
    same(f"{PARALLELISM}.num_micro_batches", whole(1), 4, "batching.micro_batches"),
    *notes(
        "belongs to training: no effect on inference",
        Param(f"{PARALLELISM}.gradient_accumulation", FLAG, True),
        Param(f"{PARALLELISM}.accumulation_steps", whole(1), 1),
        Param(f"{PARALLELISM}.activation_checkpointing", FLAG, True),
    ),
    Param(f"{PARALLELISM}.comm_backend", variant_of(CommBackend), "NCCL").means(
        note("not supported: tokens travel through host memory, not from GPU to GPU; answers are the same", on=CommBackend.NCCL),
        note("tokens always travel through host memory", on=CommBackend.Gloo),
        refusal("not supported: there is no MPI transport", on=CommBackend.MPI),
        refusal("not supported: there is no InfiniBand transport", on=CommBackend.InfiniBand),
    ),
    Param(f"{PARALLELISM}.pipeline_schedule", variant_of(PipelineSchedule), "GPipe").means(
        note(_FORWARD_ONLY, on=PipelineSchedule.GPipe),
        note(_FORWARD_ONLY, on=PipelineSchedule.PipeDream),
        note(_FORWARD_ONLY, on=PipelineSchedule.PipeDream2BW),
        note("not supported: a host belongs to one stage; answers are the same", on=PipelineSchedule.Interleaved1F1B),
        note("not supported: the schedule does not follow measured times; answers are the same", on=PipelineSchedule.Adaptive),
    ),
    Param(f"{PARALLELISM}.memory_optimization", variant_of(MemoryOptimization), "Medium").means(
        effect({"model.dtype": None}, "experts are as stored", on=MemoryOptimization.None_),
        effect({"model.dtype": None}, "experts are as stored", on=MemoryOptimization.Low),
        effect({"model.dtype": "bfloat16"}, on=MemoryOptimization.Medium),
        effect(
            {"placement.gpus_per_host": 0.0, "model.dtype": "bfloat16"},
            "all experts, not only the cold ones, are in pageable host memory",
            on=MemoryOptimization.High,
        ),
        effect(
            {"model.quantization": "int8", "model.dtype": "bfloat16"},
            "the type is of what is not quantized; all experts are loaded, none on demand",
            on=MemoryOptimization.Extreme,
        ),
    ),
]
