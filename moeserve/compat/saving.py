"""Modules -> what a checkpoint says of them: as two projections where they are that, else as a class and what it is made with.

H hidden size, I intermediate size.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, TypeGuard

from torch import Tensor, nn

from moeserve.checkpoints import SavedLayer, prefixed, save
from moeserve.config import Activation, GatingConfig, LayerConfig
from moeserve.errors import ConfigError
from moeserve.experts import FeedForward, make_module

ExpertArgs = Mapping[str, Any] | Sequence[Mapping[str, Any]] | None


class Saveable(Protocol):
    """A layer that knows what to write of itself."""

    def saved(self, name: str, expert_args: ExpertArgs = None) -> SavedLayer:
        """Under `name`; expert_args: what its experts' class is made with, where nobody else knows."""
        ...


def save_layers(folder: str | Path, layers: Mapping[str, Saveable], expert_args: ExpertArgs = None) -> None:
    """Write several layers, by name, into one folder that `moeserve serve` takes.

    expert_args: as in `save` of the layers, for all of them. Raises ConfigError with one sentence.
    """
    save(folder, [layer.saved(name, expert_args) for name, layer in layers.items()])


def feed_forward_of(module: nn.Module) -> FeedForward | None:
    """The two projections of nn.Sequential(Linear, GELU or ReLU, Linear), with or without biases; None for any other module."""
    parts = list(module) if type(module) is nn.Sequential else []
    if len(parts) != 3 or not _computes_as_linear(parts[0]) or not _computes_as_linear(parts[2]):
        return None
    up, activation, down = parts[0], _activation_of(parts[1]), parts[2]
    if activation is None or (up.bias is None) != (down.bias is None) or up.out_features != down.in_features:
        return None
    return FeedForward(activation, up.weight, down.weight, up.bias, down.bias)


def _computes_as_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Also a parametrized one, whose class is another."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def _activation_of(module: nn.Module) -> Activation | None:
    if type(module) is nn.GELU and module.approximate == "none":
        return "gelu"
    return "relu" if type(module) is nn.ReLU else None


def described_modules(experts: Sequence[nn.Module], args: ExpertArgs) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The keys of [[layers]] for these experts, and the tensors of each.

    Raises ConfigError when their class cannot be imported by its path, or is not made with `args`.
    """
    projections = [found for expert in experts if (found := feed_forward_of(expert)) is not None]
    kinds = {(each.activation, each.gate_up_bias is not None) for each in projections}
    if len(projections) == len(experts) and len(kinds) == 1:
        activation, bias = kinds.pop()
        sizes = [each.down_proj.shape[1] for each in projections]
        keys = {"activation": activation, "bias": bias, "intermediate_size": sizes[0] if len(set(sizes)) == 1 else sizes}
        return keys, [each.tensors for each in projections]
    path = _path_of(experts)
    every = list(args) if isinstance(args, Sequence) else [args or {}] * len(experts)
    if len(every) != len(experts):
        raise ConfigError(f"expert_args has {len(every)} tables; allowed: one, or one for each of {len(experts)} experts")
    for expert, each in zip(experts, every, strict=True):
        _check_args(path, each, expert)
    return {"expert": path, "expert_args": dict(every[0]) if all(each == every[0] for each in every) else every}, [
        expert.state_dict() for expert in experts
    ]


def _path_of(experts: Sequence[nn.Module]) -> str:
    found = type(experts[0])
    if any(type(expert) is not found for expert in experts):
        raise ConfigError(
            f"experts are of the classes {sorted({type(expert).__name__ for expert in experts})}; a saved layer has one class"
        )
    path = f"{found.__module__}:{found.__qualname__}"
    if (
        found.__module__ == "__main__"
        or "." in found.__qualname__
        or getattr(import_module(found.__module__), found.__name__, None) is not found
    ):
        raise ConfigError(
            f"expert class {found.__qualname__} of {found.__module__} cannot be imported by a service: define it at the top of a module"
        )
    return path


def _check_args(path: str, args: Mapping[str, Any], expert: nn.Module) -> None:
    """Made again with `args`, the expert must have the same tensors."""
    try:
        json.dumps(dict(args))
    except (TypeError, ValueError):
        raise ConfigError(f"expert_args of {path} are {dict(args)!r}; a checkpoint can hold numbers, strings, lists and tables") from None
    needs = f"give save(folder, expert_args={{...}}) what {path} is made with: {_signature(type(expert))}"
    try:
        made = make_module(path, dict(args), "meta").state_dict()
    except ConfigError as error:
        raise ConfigError(f"{error}; {needs}") from None
    if {name: tensor.shape for name, tensor in made.items()} != {name: tensor.shape for name, tensor in expert.state_dict().items()}:
        raise ConfigError(f"expert {path!r} made with {dict(args)} has other tensors than the layer's; {needs}")


def _signature(made: type[nn.Module]) -> str:
    return str(inspect.signature(made.__init__).replace(return_annotation=inspect.Signature.empty))


def saved_layer(
    name: str,
    gate: Tensor,
    gating: GatingConfig,
    modules: Sequence[nn.Module],
    args: ExpertArgs,
    residual: Mapping[str, Tensor] = MappingProxyType({}),
) -> SavedLayer:
    """A layer of modules. gate [E, H]; residual: weight and bias of the mixer, and then the last of the modules is that branch."""
    num_experts, hidden_size = gate.shape
    if residual and isinstance(args, Sequence):
        args = [*args, *args[:1]]
    keys, tensors = described_modules(modules, args)
    if residual:
        keys, shared = _without_last(keys, num_experts)
        keys["shared_expert"] = {**shared, "mixing": "residual"}
    config = LayerConfig(name=name, hidden_size=hidden_size, num_experts=num_experts, gating=gating, **keys)
    named = {"gate.weight": gate, **prefixed("mixer", residual)}
    for number, each in enumerate(tensors):
        named |= prefixed(f"experts.{number}" if number < num_experts else "shared_expert", each)
    return SavedLayer(config, named)


def _without_last(keys: dict[str, Any], num_experts: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The keys of the experts, and those of the module after them."""
    own: dict[str, Any] = {key: keys[key] for key in ("expert",) if key in keys}
    several: dict[str, Any] = {key: keys[key] for key in ("intermediate_size", "expert_args") if key in keys}
    last = {key: value[num_experts] if isinstance(value, list) else value for key, value in several.items()}
    first = {key: value[:num_experts] if isinstance(value, list) else value for key, value in several.items()}
    return {**keys, **first}, {**own, **last}
