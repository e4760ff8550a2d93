"""Clients of a service; nothing here imports the engine."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from moeserve.api.wire import WireRequest, WireResponse
    from moeserve.client.admin import AdminClient
    from moeserve.client.async_client import AsyncClient
    from moeserve.client.client import Client
    from moeserve.client.connection import TLS
    from moeserve.client.control import ControlClient
    from moeserve.client.pipeline import through_layers
    from moeserve.observe.stats import LayerInfo

__all__ = [
    "TLS",
    "AdminClient",
    "AsyncClient",
    "Client",
    "ControlClient",
    "LayerInfo",
    "WireRequest",
    "WireResponse",
    "through_layers",
]

#: name -> module, imported on first use: administration needs no tensors, and few programs need transformers
_HOME = {
    "TLS": "moeserve.client.connection",
    "AdminClient": "moeserve.client.admin",
    "AsyncClient": "moeserve.client.async_client",
    "Client": "moeserve.client.client",
    "ControlClient": "moeserve.client.control",
    "LayerInfo": "moeserve.observe.stats",
    "WireRequest": "moeserve.api.wire",
    "WireResponse": "moeserve.api.wire",
    "connect_experts": "moeserve.engines.hf",
    "load_model": "moeserve.engines.hf_loader",
    "through_layers": "moeserve.client.pipeline",
}

# transformers takes seconds to import: "moeserve" is registered when another module imports it, or at once if that has happened.
wrapt.register_post_import_hook(lambda _: import_module("moeserve.engines.hf"), "transformers.integrations.moe")


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'moeserve.client' has no attribute {name!r}")
