"""The calls of a process of vLLM to the service, and how long it tries.

T tokens, H hidden size, K choices per token.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, Final

import torch

from moeserve.api.output import ForwardOutput
from moeserve.engines.vllm.connection import connect
from moeserve.engines.vllm.failures import FAILED, can_fail_requests
from moeserve.engines.vllm.settings import Settings
from moeserve.errors import ConfigError, DeadlineExceeded, ExpertUnavailable, MoEServeError, Overloaded
from moeserve.log_limit import limited_logger
from moeserve.observe.stats import LayerInfo

_log: Final = limited_logger(__name__)
#: what may pass
_PASSING: Final = (DeadlineExceeded, ExpertUnavailable, Overloaded)
_ATTEMPT_S: Final = 60.0
_PAUSE_S: Final = 0.5


class ServiceCalls:
    """Of all layers of a model. Raises ConfigError or another MoEServeError when the service does not answer."""

    def __init__(self, settings: Settings, fails_requests: bool) -> None:
        self._settings, self._fails_requests = settings, fails_requests
        self._client = connect(settings)
        self._layers = self._client.layers()

    def place(self, name: str, num_experts: int, hidden_size: int) -> LayerInfo:
        """The served layer for vLLM's layer `name`: of that name, or else number. Raises ConfigError for none, or one of other sizes."""
        path = f".{name.removesuffix('.experts')}"
        found = [layer for layer in self._layers if path.endswith(f".{layer.name}") or f".{layer.name}".endswith(path)]
        found = found or [layer for layer in self._layers if _number(layer.name) == _number(name) is not None]
        if len(found) != 1:
            names = ", ".join(layer.name for layer in self._layers[:4]) + " and more" * (len(self._layers) > 4)
            raise ConfigError(f"the service at {self._settings.target} has no layer for vLLM's {name}; served: {names}")
        (layer,) = found
        if (layer.num_experts, layer.hidden_size) != (num_experts, hidden_size):
            raise ConfigError(
                f"vLLM's {name} has {num_experts} experts of hidden size {hidden_size}, the layer {layer.name} at "
                f"{self._settings.target} has {layer.num_experts} of {layer.hidden_size}"
            )
        return layer

    def forward(
        self, layer: LayerInfo, hidden_states: torch.Tensor, used: torch.Tensor | None, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> torch.Tensor:
        """[T, H] -> [T, H]. Raises the MoEServeError of the service when it answers nothing else for `timeout_s`.

        Where vLLM can be told which requests have failed, it answers zeros instead, until the end of the step.
        """
        if FAILED.why is not None:
            return torch.zeros_like(hidden_states)
        try:
            ask = partial(self._client.forward, hidden_states, layer.index, used, topk_ids, topk_weights, model=self._settings.model)
            return self._answered(layer.name, ask)
        except MoEServeError as error:
            if not self._fails_requests:
                raise
            FAILED.why = f"{layer.name}: {error}"
            return torch.zeros_like(hidden_states)

    def _answered(self, name: str, ask: Callable[..., ForwardOutput]) -> torch.Tensor:
        until = time.monotonic() + self._settings.timeout_s
        while True:
            try:
                left_s = max(until - time.monotonic(), _PAUSE_S)
                return ask(timeout=min(left_s, _ATTEMPT_S)).hidden_states
            except _PASSING as error:
                left_s = until - time.monotonic() - _PAUSE_S
                if left_s <= 0 or (isinstance(error, Overloaded) and error.retry_after_s is None):  # it would not fit then either
                    raise
                _log.warning("%s: trying again for %.0f s: %s", name, left_s, error)
            time.sleep(_PAUSE_S)


def used_rows(is_padding: torch.Tensor, part: int, count: int) -> torch.Tensor:
    """[count] of the rows of that part of a batch: whether they are of requests. The last parts may have more rows than are left."""
    used = ~is_padding[part * count : (part + 1) * count]
    return torch.nn.functional.pad(used, (0, count - len(used)))


def _number(name: str) -> int | None:
    """Of the layer in its model."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(found[1]) if found else None


@lru_cache
def _calls(settings: Settings, fails_requests: bool) -> ServiceCalls:
    return ServiceCalls(settings, fails_requests)


def calls_to(settings: Settings, vllm_config: Any, moe: Any) -> ServiceCalls:
    """Those of this process."""
    return _calls(settings, can_fail_requests(vllm_config, moe))
