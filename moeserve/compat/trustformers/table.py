"""TrustformeRS' two structs as one table; their fields carry the struct's key in front."""

from __future__ import annotations

from moeserve.compat.sizes import expert_extras, hidden_size_extra
from moeserve.compat.table import System
from moeserve.compat.trustformers.experts import EXPERT_PARAMS, EXPERT_RULES
from moeserve.compat.trustformers.hosts import AS_MANY_LAYERS_AS_STAGES, layers_extra, num_layers
from moeserve.compat.trustformers.parallelism import PARALLELISM_PARAMS

TRUSTFORMERS = System(
    name="trustformers",
    source="`ExpertParallelismConfig` and `ParallelismConfig` of trustformers-training 0.1 and 0.2",
    params=[*EXPERT_PARAMS, *PARALLELISM_PARAMS, layers_extra(), hidden_size_extra(), *expert_extras("hidden_size")],
    rules=[*EXPERT_RULES, AS_MANY_LAYERS_AS_STAGES],
    base={"layers.gating.capacity_rule": "trustformers"},
    smallest={},
    num_layers=num_layers,
)
