"""What stands in the place of vLLM's `RoutedExperts` and of how it computes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

from moeserve.engines.vllm.calls import ServiceCalls, calls_to
from moeserve.engines.vllm.checks import require_possible
from moeserve.engines.vllm.operator import CalledLayer, routed_experts
from moeserve.engines.vllm.settings import settings_of


class RemoteExperts(FusedMoEMethodBase):  # type: ignore[misc]  # vLLM is not installed where types are checked
    """Of one layer: no weights, and a call for every batch, after vLLM's own router."""

    #: without it, the tokens of all ranks would be gathered first: a rank calls for its own
    supports_internal_mk = True

    def __init__(self, moe: Any, calls_to_service: Callable[[], ServiceCalls], layer_name: str) -> None:
        super().__init__(moe)
        #: None: this rank does not call. Tensor-parallel ranks have the same input, and their outputs are summed, unless each has its rows.
        self.remote: CalledLayer | None = None
        rank = get_tensor_model_parallel_rank()
        if moe.is_sequence_parallel or rank == 0:
            calls = calls_to_service()
            self.remote = CalledLayer(calls, calls.place(layer_name, moe.num_experts, moe.hidden_dim), rank)

    def create_weights(self, layer: Any, *sizes: Any, **more: Any) -> None:
        """None are here."""

    def maybe_roundup_sizes(self, hidden_size: int, intermediate_size: int, *_: Any) -> tuple[int, int]:
        """No kernel here needs other sizes."""
        return hidden_size, intermediate_size

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """Weights are quantized in the service."""

    def apply(self, layer: Any, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """[T, H], [T, K], [T, K] -> [T, H]; the runner has computed the shared experts."""
        if layer.apply_router_weight_on_input:  # Llama 4: one choice, which weighs what the expert gets
            x, topk_weights = x * topk_weights.to(x.dtype), torch.ones_like(topk_weights)
        answer: torch.Tensor = routed_experts(x, topk_weights, topk_ids, layer.layer_name)
        return answer


class _Remote:
    """Mixed into a class of vLLM; as the class itself where no service is configured."""

    def _get_quant_method(self, prefix: str, quant_config: Any, moe_config: Any) -> Any:
        vllm_config = get_current_vllm_config()
        settings = settings_of(vllm_config.additional_config)
        if settings is None:
            return super()._get_quant_method(prefix, quant_config, moe_config)  # type: ignore[misc]
        require_possible(vllm_config, moe_config)
        return RemoteExperts(moe_config, partial(calls_to, settings, vllm_config, moe_config), prefix)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterable[str]:
        if not isinstance(self.quant_method, RemoteExperts):  # type: ignore[attr-defined]
            yield from super().load_weights(weights)  # type: ignore[misc]
            return
        for _ in weights:  # of loaders that cannot leave them out
            pass


def adopt(module: ModuleType) -> None:
    """Every class of routed experts in `module`, from now on made as a remote one."""
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts  # noqa: PLC0415  # it may be `module`

    own = [each for each in vars(module).values() if isinstance(each, type) and each.__module__ == module.__name__]
    for each in own:
        if issubclass(each, RoutedExperts):
            cls: Any = each
            cls.register_oot(type(f"Remote{each.__name__}", (_Remote, each), {}))
