"""Mappings from flat names, and what every imported configuration must be good for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from moeserve.checkpoints import layer_sources
from moeserve.config import ServiceConfig
from moeserve.gating import route
from moeserve.placement import plan_placement


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"table.key": value} -> {"table": {"key": value}}."""
    mapping: dict[str, Any] = {}
    for dotted, value in flat.items():
        table, _, key = dotted.rpartition(".")
        (mapping.setdefault(table, {}) if table else mapping)[key] = value
    return mapping


def assert_servable(config: ServiceConfig) -> None:
    """Layers can be made of it and placed, and its gate routes."""
    specs = [source.spec for source in layer_sources(config)]
    plan_placement(specs, config.placement)
    num_experts = specs[0].num_experts
    drawn = torch.Generator().manual_seed(0)
    logits, hidden_states, centroids = (torch.randn(rows, num_experts, generator=drawn) for rows in (9, 9, num_experts))
    routing = route(logits, specs[0].gating, token_ids=torch.arange(9), hidden_states=hidden_states, centroids=centroids)
    assert torch.equal(routing.requested, routing.processed + routing.dropped)
