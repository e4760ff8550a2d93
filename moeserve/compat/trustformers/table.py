"""`ExpertParallelismConfig` and `ParallelismConfig` of trustformers-training 0.1 and 0.2 as one table of dotted names."""

from __future__ import annotations

from moeserve.compat.sizes import HIDDEN_SIZE, sized_expert_extras
from moeserve.compat.system import System
from moeserve.compat.table import gate
from moeserve.compat.trustformers.experts import EXPERT_PARAMS, EXPERT_RULES
from moeserve.compat.trustformers.hosts import AS_MANY_LAYERS_AS_STAGES, NOT_TOO_MANY_LAYERS, NUM_LAYERS, num_layers
from moeserve.compat.trustformers.parallelism import PARALLELISM_PARAMS

TRUSTFORMERS = System(
    name="trustformers",
    params=[*EXPERT_PARAMS, *PARALLELISM_PARAMS, NUM_LAYERS, HIDDEN_SIZE, *sized_expert_extras("hidden_size")],
    rules=[*EXPERT_RULES, NOT_TOO_MANY_LAYERS, AS_MANY_LAYERS_AS_STAGES],
    base=gate(capacity_rule="trustformers"),
    smallest={},
    num_layers=num_layers,
)
