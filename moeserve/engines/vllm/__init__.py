"""vLLM models with their routed experts in a service. vLLM calls `register` by the entry point `vllm.general_plugins`, in every process.

    vllm serve MODEL --additional-config '{"moeserve": {"target": "127.0.0.1:50051"}}'

vLLM keeps attention, routers and shared experts. Routed experts are neither read from disk nor in its memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from types import ModuleType
from typing import Final

import wrapt

#: module of vLLM -> the module here with `adopt`, which is called with it as soon as it is imported
_ADOPTED_BY: Final[Mapping[str, str]] = {
    "vllm.model_executor.layers.fused_moe.routed_experts": "experts",
    "vllm.model_executor.models.dbrx": "experts",
    "vllm.model_executor.models.gpt_oss": "experts",
    "vllm.model_executor.models.transformers.moe": "experts",
    "vllm.model_executor.model_loader": "loader",
    "vllm.v1.core.sched.scheduler": "failures",
    "vllm.v1.worker.gpu_worker": "failures",
}
_adopted: Final[set[str]] = set()


def register() -> None:
    """Imports nothing of vLLM; a second call changes nothing. Without a target in vLLM's configuration, all stays as it is."""
    for name in _ADOPTED_BY:
        if name not in _adopted:
            _adopted.add(name)
            wrapt.register_post_import_hook(_adopt, name)


def _adopt(module: ModuleType) -> None:
    import_module(f"{__name__}.{_ADOPTED_BY[module.__name__]}").adopt(module)
