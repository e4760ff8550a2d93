"""TrustformeRS' two configuration structs and their six enums: the names, variants and defaults of `trustformers-training`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class LoadBalancingStrategy(StrEnum):
    """Who chooses whom, and how a replica of the chosen expert is picked."""

    TokenChoiceBased = "TokenChoiceBased"
    ExpertChoiceBased = "ExpertChoiceBased"
    Dynamic = "Dynamic"
    RoundRobin = "RoundRobin"
    LoadAware = "LoadAware"


class ExpertRoutingStrategy(StrEnum):
    """What an expert is chosen by."""

    LearnedGating = "LearnedGating"
    HashBased = "HashBased"
    Random = "Random"
    LoadBased = "LoadBased"
    SimilarityBased = "SimilarityBased"


class ExpertCommunicationPattern(StrEnum):
    """How tokens travel to experts."""

    AllToAll = "AllToAll"
    PointToPoint = "PointToPoint"
    Hierarchical = "Hierarchical"
    Ring = "Ring"


class CommBackend(StrEnum):
    """What carries tensors between devices."""

    NCCL = "NCCL"
    Gloo = "Gloo"
    MPI = "MPI"
    InfiniBand = "InfiniBand"


class PipelineSchedule(StrEnum):
    """In which order micro-batches pass the stages."""

    GPipe = "GPipe"
    PipeDream = "PipeDream"
    PipeDream2BW = "PipeDream2BW"
    Interleaved1F1B = "Interleaved1F1B"
    Adaptive = "Adaptive"


class MemoryOptimization(StrEnum):
    """How much is done to save memory."""

    None_ = "None"
    Low = "Low"
    Medium = "Medium"
    High = "High"
    Extreme = "Extreme"


@dataclass(frozen=True)
class ExpertParallelismConfig:
    """Experts and their gate; `moeserve.compat.load` checks the values."""

    num_experts: int = 8
    experts_per_device: int = 2
    expert_parallel_size: int = 4
    top_k: int = 2
    load_balancing: LoadBalancingStrategy = LoadBalancingStrategy.TokenChoiceBased
    routing_strategy: ExpertRoutingStrategy = ExpertRoutingStrategy.LearnedGating
    capacity_factor: float = 1.25
    drop_tokens: bool = False
    use_auxiliary_loss: bool = True
    auxiliary_loss_weight: float = 0.01
    communication_pattern: ExpertCommunicationPattern = ExpertCommunicationPattern.AllToAll


@dataclass(frozen=True)
class ParallelismConfig:
    """Replicas, shards and stages."""

    dp_size: int = 1
    mp_size: int = 1
    pp_size: int = 1
    num_micro_batches: int = 4
    gradient_accumulation: bool = True
    accumulation_steps: int = 1
    activation_checkpointing: bool = True
    comm_backend: CommBackend = CommBackend.NCCL
    pipeline_schedule: PipelineSchedule = PipelineSchedule.GPipe
    memory_optimization: MemoryOptimization = MemoryOptimization.Medium
