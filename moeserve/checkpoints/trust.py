"""What a checkpoint may have imported: naming a class is running code."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence

from torch import nn

from moeserve.config import LayerConfig
from moeserve.errors import ConfigError
from moeserve.experts import module_class

_TORCH = "torch.nn.modules"


def check_trusted(name: str, layer: LayerConfig, trusted: Sequence[str]) -> None:
    """Raises ConfigError unless the layer names only classes of torch.nn, and of the packages the operator trusts.

    Nothing is imported before its package is known to be trusted. An expert must be a class of nn.Module: a package also has what it
    imported itself, and not all of that is meant to be called by a file.
    """
    for key, path in _named(layer):
        module = path.partition(":")[0]
        if module == "torch.nn" or _is_in(module, _TORCH):
            if key == "gating.routing" or not _is_of_torch(path):
                raise ConfigError(f"layer {name}: {key} is {path!r}, which is not a module of torch.nn")
        elif not any(_is_in(module, package) for package in trusted):
            raise ConfigError(
                f"layer {name}: the checkpoint names {path!r} as {key}, and to make one runs its code; "
                f"if you trust it, allow it with model.trusted_modules = [{module.partition('.')[0]!r}]"
            )
        elif key != "gating.routing" and not _is_module(path):
            raise ConfigError(f"layer {name}: {key} is {path!r}, which is not a class of nn.Module")


def _named(layer: LayerConfig) -> Iterator[tuple[str, str]]:
    if layer.expert is not None:
        yield "expert", layer.expert
    if layer.shared_expert is not None and layer.shared_expert.expert is not None:
        yield "shared_expert.expert", layer.shared_expert.expert
    if ":" in layer.gating.routing:
        yield "gating.routing", layer.gating.routing


def _is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def _is_module(path: str) -> bool:
    found = module_class(path)
    return inspect.isclass(found) and issubclass(found, nn.Module)


def _is_of_torch(path: str) -> bool:
    return _is_module(path) and _is_in(module_class(path).__module__, _TORCH)
