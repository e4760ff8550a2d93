"""Requests within a process, as a service would have read them from their bytes."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, Final

import torch

from moeserve.api.wire import REQUEST_TENSORS, WireRequest, decode_forward_request, encode_forward_request

#: what is checked, and converted, by encoding it
_SCALARS: Final = [one.name for one in fields(WireRequest) if one.name not in REQUEST_TENSORS]
_NO_TENSORS: Final[dict[str, Any]] = {**dict.fromkeys(REQUEST_TENSORS), "hidden_states": torch.empty(0, 0, dtype=torch.float32)}


def received(request: WireRequest) -> WireRequest:
    """The request as it would arrive, without its bytes; tensors are on the CPU. Raises as `encode_forward_request`."""
    changes: dict[str, Any] = {}
    if not _is_plain(request):
        read = decode_forward_request(encode_forward_request(replace(request, **_NO_TENSORS)))
        changes = {name: getattr(read, name) for name in _SCALARS}
    for name in REQUEST_TENSORS:
        tensor = getattr(request, name)
        if tensor is not None and (tensor.requires_grad or not tensor.is_cpu or tensor.is_neg() or type(tensor) is not torch.Tensor):
            changes[name] = tensor.detach().cpu().resolve_neg()
    weights = changes.get("topk_weights", request.topk_weights)
    if weights is not None and weights.dtype is torch.float64:
        changes["topk_weights"] = weights.float()
    return replace(request, **changes) if changes else request


def _is_plain(request: WireRequest) -> bool:
    """Whether encoding it would change nothing: it has only defaults beside its tensors, and a layer that can be sent."""
    layer = request.layer
    has_layer = isinstance(layer, str) or (type(layer) is int and 0 <= layer < 2**32)
    is_default = not request.model and type(request.return_routing) is bool
    return has_layer and is_default and request.capacity_factor is None and request.noise is None and request.seed is None
