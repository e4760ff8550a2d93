"""One MoE layer in one process: gate, experts, combine. No Ray, no sockets; the reference for all tests.

T tokens, H hidden size, I intermediate size, E experts, K choices per token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, Unpack

import numpy as np
import torch

from moeserve.api import surroundings
from moeserve.api.find_layer import find_layer
from moeserve.api.output import ForwardOutput
from moeserve.api.received import received
from moeserve.api.request import LayerRequest, RequestOptions, validate
from moeserve.api.tensors import FLOAT_DTYPES, dtype_name
from moeserve.api.wire import WireRequest, check_request
from moeserve.checkpoints import LayerSource, SavedLayer, layer_sources, load_bank, save, saved_experts
from moeserve.config import Activation, GatingConfig, GatingOverrides, Kernel, LayerSpec, Quantization, load_config, override
from moeserve.errors import ConfigError, UnknownLayer
from moeserve.gating import BatchRouting, Router, Routing, apply_choices
from moeserve.layer.dispatch import combine, permute
from moeserve.layer.head import LayerHead
from moeserve.placement import LayerPlacement

_MAX_TOKENS = 2**24


class MoELayer:
    """A layer of random weights (the same seed gives the same weights here and in a service), or one of a checkpoint.

    The arguments are the keys of [[layers]] and [model] in a service's configuration. Raises ConfigError for impossible sizes or gating.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        num_experts: int,
        intermediate_size: int | tuple[int, ...] | None = None,
        identity_experts: int = 0,
        zero_experts: int = 0,
        activation: Activation = "swiglu",
        bias: bool = False,
        expert: str | None = None,
        expert_args: Mapping[str, Any] | Sequence[Mapping[str, Any]] = MappingProxyType({}),
        shared_expert: Mapping[str, Any] | None = None,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        gating: GatingConfig | None = None,
        quantization: Quantization | None = None,
        kernel: Kernel = "auto",
        deterministic: bool = False,
    ) -> None:
        layer = {
            "hidden_size": hidden_size,
            "intermediate_size": intermediate_size,
            "num_experts": num_experts,
            "identity_experts": identity_experts,
            "zero_experts": zero_experts,
            "activation": activation,
            "bias": bias,
            "expert": expert,
            "expert_args": dict(expert_args) if isinstance(expert_args, Mapping) else list(expert_args),
            "shared_expert": shared_expert,
            "seed": seed,
            "gating": gating or GatingConfig(),
        }
        model = {"dtype": _dtype_key(dtype), "quantization": quantization, "kernel": kernel, "deterministic": deterministic}
        self._load(layer_sources(load_config({"model": model, "layers": [layer]}))[0])

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        layer: int | str = 0,
        dtype: torch.dtype | None = None,
        gating: GatingConfig | None = None,
        quantization: Quantization | None = None,
        trusted_modules: Sequence[str] = (),
        kernel: Kernel = "auto",
        deterministic: bool = False,
        family: str | None = None,
    ) -> MoELayer:
        """MoE layer `layer` (position among the MoE layers, or name) of a checkpoint folder; `gating` changes the settings it names.

        trusted_modules: packages whose classes the checkpoint may name as experts, beside those of torch.nn: that runs their code.
        family: whose rules it follows, when its config.json does not say so.
        Raises CheckpointError, or UnknownLayer when there is no such layer.
        """
        model = {
            "checkpoint": Path(path),
            "dtype": None if dtype is None else _dtype_key(dtype),
            "quantization": quantization,
            "trusted_modules": list(trusted_modules),
            "kernel": kernel,
            "deterministic": deterministic,
            "family": family,
        }
        sources = layer_sources(load_config({"model": model, "layers": [{"gating": gating}] if gating else []}))
        names = [source.spec.name for source in sources]
        try:
            return cls.from_source(sources[find_layer(names, layer)])
        except UnknownLayer:
            raise UnknownLayer(f"{path} has no MoE layer {layer!r}; it has 0..{len(sources) - 1}: {names}") from None

    @classmethod
    def from_source(cls, source: LayerSource) -> MoELayer:
        """The layer of which `source` tells."""
        self = cls.__new__(cls)
        self._load(source)
        return self

    @surroundings.put_aside()
    def _load(self, source: LayerSource) -> None:
        self.spec: LayerSpec = source.spec
        self.head = LayerHead(source)
        everyone = source.spec.num_hosted_experts
        self._placement = LayerPlacement(1, np.arange(everyone), np.zeros(everyone, dtype=np.int64))
        self.bank = load_bank(source, self._placement.shards_on(0))

    def save(self, folder: str | Path, name: str | None = None) -> None:
        """Write a checkpoint folder that `moeserve serve` and `from_checkpoint` take. Raises ConfigError for experts it cannot hold."""
        save(folder, [self.saved(name or self.spec.name)])

    @surroundings.put_aside()
    def saved(self, name: str, expert_args: object = None) -> SavedLayer:
        """This layer as it goes into a folder, under `name`; expert_args are known already."""
        return saved_experts(name, self.spec, self.router, self.head.mixer, self.bank.experts)

    @property
    def router(self) -> Router:
        """The gate and its tensors."""
        return self.head.router

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[T, H] -> [T, H], same dtype."""
        return self.run(hidden_states).hidden_states

    @surroundings.put_aside()
    @torch.inference_mode()
    def run(
        self,
        hidden_states: torch.Tensor,
        used_token: torch.Tensor | None = None,
        topk_ids: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        return_routing: bool = False,
        **options: Unpack[RequestOptions],
    ) -> ForwardOutput:
        """One request; arguments and answer as in `Client.forward`. Raises InvalidRequest, and NonFiniteOutput."""
        asked = WireRequest(hidden_states, 0, used_token, topk_ids, topk_weights, return_routing, **options)
        check_request(asked)
        return self._answer(validate(received(asked).for_layer(None, ""), self.spec, _MAX_TOKENS)).to(hidden_states.device)

    def _answer(self, request: LayerRequest) -> ForwardOutput:
        hidden_states = request.hidden_states
        routing = route_batch(self.router, request)
        answers = []
        choices = routing.topk_ids, routing.topk_weights, routing.kept
        planned = self.head.plan(*choices, hidden_states, request.used_token, self._placement, is_routed=request.is_routed)
        for work in planned.works:
            partial = torch.empty(len(work.rows), self.spec.hidden_size, dtype=torch.float32)
            self.bank.run(permute(hidden_states, work.rows), work.row_index, work.local_experts, work.weights, out=partial)
            answers.append((work.rows, partial))
        total = self.head.finish(combine(answers, request.num_tokens, self.spec.hidden_size), hidden_states, planned)
        of_request = routing.request(0)
        return to_output(of_request, self.head.rounded(total, request, of_request), request.return_routing)


class RoutedTogether(Protocol):
    """Tokens that are routed together: one `LayerRequest`, or a `Batch` of several of the same kind."""

    @property
    def hidden_states(self) -> torch.Tensor:
        """[T, H]."""
        ...

    @property
    def sizes(self) -> list[int]:
        """Tokens of each request."""
        ...

    @property
    def used_token(self) -> torch.Tensor | None:
        """[T] bool; None = all."""
        ...

    @property
    def topk_ids(self) -> torch.Tensor | None:
        """[T, K] int, where the callers routed."""
        ...

    @property
    def topk_weights(self) -> torch.Tensor | None:
        """[T, K] float, where the callers routed."""
        ...

    @property
    def token_ids(self) -> torch.Tensor | None:
        """[T] int, where the gate needs them."""
        ...

    @property
    def overrides(self) -> GatingOverrides:
        """The overrides that all requests share."""
        ...


def route_batch(router: Router, tokens: RoutedTogether) -> BatchRouting:
    """Route by the layer's own gate, or by the callers' choices."""
    gating, ids, weights = override(router.gating, tokens.overrides), tokens.topk_ids, tokens.topk_weights
    if ids is None or weights is None:
        return router(tokens.hidden_states, tokens.sizes, tokens.used_token, tokens.token_ids, gating)
    return apply_choices(ids, weights, router.num_experts, gating, tokens.sizes, tokens.used_token)


def to_output(routing: Routing, hidden_states: torch.Tensor, return_routing: bool, revision: int = 1) -> ForwardOutput:
    """The output for the caller of one request."""
    return ForwardOutput(
        hidden_states=hidden_states,
        requested=routing.requested,
        processed=routing.processed,
        dropped=routing.dropped,
        dropped_tokens=routing.dropped_tokens,
        aux_loss=routing.aux_loss,
        model_revision=revision,
        z_loss=routing.z_loss,
        topk_ids=routing.topk_ids if return_routing else None,
        topk_weights=routing.topk_weights if return_routing else None,
        slots=routing.slots if return_routing else None,
        drop_reasons=routing.drop_reasons if return_routing else None,
    )


def _dtype_key(dtype: torch.dtype) -> str:
    if dtype not in FLOAT_DTYPES.values():
        raise ConfigError(f"dtype {dtype!r} is not supported; allowed: {', '.join(map(str, FLOAT_DTYPES.values()))}")
    return dtype_name(dtype)
