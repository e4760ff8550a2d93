"""Who goes where: one file per routing, from GateInput to Selection."""

from __future__ import annotations

from collections.abc import Mapping

from moeserve.config import GatingConfig
from moeserve.gating.gate_input import Routing
from moeserve.gating.routings.caller import by_caller
from moeserve.gating.routings.chance import by_chance
from moeserve.gating.routings.expert_choice import expert_choice
from moeserve.gating.routings.hashing import by_hash
from moeserve.gating.routings.learned import learned
from moeserve.gating.routings.least_loaded import least_loaded
from moeserve.gating.routings.mindformers import mindformers
from moeserve.gating.routings.plugin import load_plugin
from moeserve.gating.routings.similarity import similarity
from moeserve.gating.routings.sparsemixer import sparsemixer
from moeserve.gating.routings.token_table import by_token_table

#: value of `routing` -> GateInput -> Selection
ROUTINGS: Mapping[str, Routing] = {
    "learned": learned,
    "expert_choice": expert_choice,
    "hash": by_hash,
    "token_table": by_token_table,
    "random": by_chance,
    "least_loaded": least_loaded,
    "similarity": similarity,
    "mindformers": mindformers,
    "sparsemixer": sparsemixer,
    "caller": by_caller,
}


def routing_of(gating: GatingConfig) -> Routing:
    """The routing by its name, or the plug-in. Raises ConfigError when that cannot be imported."""
    return ROUTINGS.get(gating.routing) or load_plugin(gating)
