"""The systems whose configurations can be imported, and the one way to do it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moeserve.compat.colossalai.table import COLOSSALAI
from moeserve.compat.deepspeed.table import DEEPSPEED
from moeserve.compat.mindformers.table import MINDFORMERS
from moeserve.compat.system import System
from moeserve.compat.trustformers.table import TRUSTFORMERS
from moeserve.compat.walk import ImportedConfig, walk
from moeserve.errors import ConfigError

SYSTEMS: Mapping[str, System] = {system.name: system for system in (DEEPSPEED, COLOSSALAI, MINDFORMERS, TRUSTFORMERS)}


def load(system: str, mapping: Any) -> ImportedConfig:
    """The configuration `mapping` of "deepspeed", "colossalai", "mindformers" or "trustformers", as one to serve.

    `mapping` has that system's own parameter names; moeserve.compat.mindformers.MoEConfig and the structs of
    moeserve.compat.trustformers are taken too. What a parameter means here is in docs/compat.md. Raises ConfigError naming the parameter,
    its value and what is allowed.
    """
    if system not in SYSTEMS:
        raise ConfigError(f"{system!r} is not a system configurations can be imported from; allowed: {', '.join(SYSTEMS)}")
    return walk(SYSTEMS[system], mapping)
