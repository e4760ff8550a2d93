"""TrustformeRS' configuration structs and enums, and what their fields mean here."""

from moeserve.compat.trustformers.structs import (
    CommBackend,
    ExpertCommunicationPattern,
    ExpertParallelismConfig,
    ExpertRoutingStrategy,
    LoadBalancingStrategy,
    MemoryOptimization,
    ParallelismConfig,
    PipelineSchedule,
)
from moeserve.compat.trustformers.table import TRUSTFORMERS

__all__ = [
    "TRUSTFORMERS",
    "CommBackend",
    "ExpertCommunicationPattern",
    "ExpertParallelismConfig",
    "ExpertRoutingStrategy",
    "LoadBalancingStrategy",
    "MemoryOptimization",
    "ParallelismConfig",
    "PipelineSchedule",
]
