"""How many copies an administrator wants: placement.copies, changed for one expert, for a layer or for all."""

from __future__ import annotations

from moeserve.api.find_layer import find_layer
from moeserve.config import MAX_HOSTS, Copies
from moeserve.control.desired import Planner
from moeserve.errors import ConfigError


def changed_copies(planner: Planner, layer: str, expert: int | None, copies: int) -> Copies:
    """What the planner's placement.copies becomes; layer "" = every layer, expert None = every expert of it.

    Raises UnknownLayer, or ConfigError for a number that cannot be.
    """
    sizes = {spec.name: spec.num_hosted_experts for spec in planner.layers.specs}
    if not 1 <= copies <= MAX_HOSTS:
        raise ConfigError(f"copies is {copies}; allowed: 1..{MAX_HOSTS}, each on another host")
    if not layer:
        if expert is not None:
            raise ConfigError("an expert needs a layer: name the layer of this expert")
        return copies
    find_layer([*sizes], layer)
    if expert is not None and expert >= sizes[layer]:
        raise ConfigError(f"expert is {expert}; allowed: 0..{sizes[layer] - 1}, the experts of layer {layer} that live on hosts")
    now = planner.placing.copies
    layers = dict(now) if isinstance(now, dict) else {"default": now}
    if expert is None:
        return {**layers, layer: copies}
    of_layer = layers.get(layer, layers.get("default", 1))
    if isinstance(of_layer, int):
        # A number for a layer is exact, so it is for each of its experts; the default for all layers is a lower bound.
        named = dict.fromkeys(map(str, range(sizes[layer])), of_layer) if layer in layers else {}
        of_layer = {"default": of_layer, **named}
    return {**layers, layer: {**of_layer, str(expert): copies}}
