"""Loads Hugging Face models without their experts: the service's weights are not read and take no memory here."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from moeserve.addresses import parse_target
from moeserve.engines.hf import IMPLEMENTATION, AnyClient, connect_experts, experts_of, is_client
from moeserve.errors import CheckpointError, ConfigError

log = logging.getLogger(__name__)

#: options that say where transformers finds a model
_WHERE: Final = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def load_model(
    path: str | Path, target: str | AnyClient, auto_class: Any = AutoModelForCausalLM, *, embedded: bool = False, **options: Any
) -> PreTrainedModel:
    """The model of a checkpoint folder with its experts in the service at `target`: ready to generate, and without their weights.

    auto_class: which head, as in transformers; embedded: as for `connect_experts`; options: as for its `from_pretrained` (dtype, …). The
    experts keep their shapes as tensors without data, so the model cannot be saved or trained. Raises CheckpointError when the folder
    cannot be read, ConfigError when the model has no experts, or the service has others.
    """
    from safetensors import SafetensorError  # noqa: PLC0415 - transformers brings it, and is what is named where both are missing

    if not is_client(target):
        parse_target(target)  # an invalid target is refused before weights are read
    config = _config_of(path, {name: value for name, value in options.items() if name in _WHERE})
    try:
        original = auto_class._model_mapping[type(config)]
    except KeyError:
        raise ConfigError(f"{path}: {auto_class.__name__} has no model for {config.model_type}") from None
    try:
        model: PreTrainedModel = _without_experts(original).from_pretrained(path, experts_implementation=IMPLEMENTATION, **options)
    except torch.OutOfMemoryError:
        raise
    except (OSError, LookupError, ImportError, RuntimeError, ValueError, SafetensorError) as error:
        # With the cause, as it may be one of `options`.
        raise CheckpointError(f"{path}: transformers cannot load its weights: {_sentence(error)}") from error
    model.__class__ = original
    try:
        connect_experts(model, target, embedded=embedded)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    log.info("%s: %d bytes of weights here, the experts at %s", path, sum(each.nbytes for each in model.parameters()), target)
    return model


def _config_of(path: str | Path, where: Mapping[str, Any]) -> Any:
    """What transformers makes of config.json; it looks for names that are no folders elsewhere."""
    try:
        return AutoConfig.from_pretrained(path, **where)
    except Exception as error:
        # Whatever transformers stumbles over in it, it is the file that is wrong.
        if not Path(path).is_dir():
            raise CheckpointError(f"checkpoint folder {path} does not exist, and transformers finds no model of that name") from None
        raise CheckpointError(f"{path}: transformers cannot use its config.json: {_sentence(error)}") from None


def _sentence(error: Exception) -> str:
    """The first paragraph, on one line."""
    return " ".join(str(error).partition("\n\n")[0].split()) or type(error).__name__


def _without_experts(original: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The same model, whose experts lose their weights before the files are read: transformers makes models on the meta device first."""
    names: list[str] = []

    def init(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        original.__init__(self, *args, **kwargs)
        for name, experts in experts_of(self).items():
            names.append(name)
            for module in experts.modules():
                _empty(module)

    def set_submodule(self: PreTrainedModel, target: str, *args: Any, **kwargs: Any) -> None:
        # On a GPU, quantizers put modules of theirs, with weights, in the place of experts (FP8), or of what is around them (MXFP4).
        if not any(f"{name}.".startswith(f"{target}.") for name in names):
            original.set_submodule(self, target, *args, **kwargs)

    changes = {
        "__init__": init,
        "__module__": original.__module__,
        "set_submodule": set_submodule,
        "_keys_to_ignore_on_load_unexpected": [r"\.experts\."],
    }
    return type(original.__name__, (original,), changes)


def _empty(module: torch.nn.Module) -> None:
    """Weights become attributes that are no parameters and have shapes only: `connect_experts` compares them with the service."""
    for name, weight in list(module.named_parameters(recurse=False)):
        delattr(module, name)
        setattr(module, name, torch.empty_like(weight, device="meta", requires_grad=False))
