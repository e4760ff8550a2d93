"""vLLM's loader without routed experts: their tensors are skipped before they are read from disk."""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any, Final

import torch

from moeserve.engines.vllm.settings import settings_of

#: tensors of routed experts, in the names of published checkpoints: numbered, stacked, and those whose folder is not called `experts`
_EXPERTS: Final = re.compile(
    r"(?:^|\.)experts\.(?!.*(?:e_score_correction_bias|router))"
    r"|\.block_sparse_moe\.(?:input|output)_linear\.weight$"
    r"|\.moe\.(?:gate|up|down)_proj\."
)


class _None(frozenset[int]):
    """In the place of the numbers of this rank's experts: none, in any layout."""


def is_expert(name: str) -> bool:
    """Whether a checkpoint's tensor of this name is of routed experts."""
    return _EXPERTS.search(name) is not None


def adopt(module: ModuleType) -> None:
    """Replaces the default loader for all formats that it reads."""
    from vllm.config import get_current_vllm_config  # noqa: PLC0415  # not before vLLM has been imported
    from vllm.model_executor.model_loader import weight_utils  # noqa: PLC0415

    default: Any = module.DefaultModelLoader
    skips = weight_utils.should_skip_weight

    class RemoteExpertsLoader(default):  # type: ignore[misc]
        """As the default, without routed experts where a service is configured."""

        def _init_ep_weight_filter(self, model_config: Any) -> None:
            super()._init_ep_weight_filter(model_config)
            if settings_of(get_current_vllm_config().additional_config) is not None:
                self.local_expert_ids = _None()

        def get_all_weights(self, model_config: Any, model: Any) -> Iterator[tuple[str, torch.Tensor]]:
            weights = super().get_all_weights(model_config, model)
            if not isinstance(self.local_expert_ids, _None):
                return weights
            return ((name, tensor) for name, tensor in weights if not is_expert(name))

    weight_utils.should_skip_weight = lambda name, ids: is_expert(name) if isinstance(ids, _None) else skips(name, ids)
    loaders = module._LOAD_FORMAT_TO_MODEL_LOADER
    loaders.update({name: RemoteExpertsLoader for name, loader in loaders.items() if loader is default})
