"""Calling a service; nothing here knows the engine."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import wrapt

from moeserve.client.admin import AdminClient
from moeserve.client.answers import LayerInfo
from moeserve.client.async_client import AsyncClient
from moeserve.client.client import Client
from moeserve.client.connection import TLS
from moeserve.client.control import ControlClient
from moeserve.client.pipeline import through_layers
from moeserve.wire import WireRequest, WireResponse

if TYPE_CHECKING:
    from moeserve.client.hf import connect_experts
    from moeserve.client.hf_loader import load_model

__all__ = [
    "TLS",
    "AdminClient",
    "AsyncClient",
    "Client",
    "ControlClient",
    "LayerInfo",
    "WireRequest",
    "WireResponse",
    "connect_experts",
    "load_model",
    "through_layers",
]

#: loaded on first use
_NEEDS_TRANSFORMERS = {"connect_experts": "moeserve.client.hf", "load_model": "moeserve.client.hf_loader"}

# transformers takes seconds to import: "moeserve" becomes known to it when somebody else does, at once if that has happened.
wrapt.register_post_import_hook(lambda _: import_module("moeserve.client.hf"), "transformers.integrations.moe")


def __getattr__(name: str) -> Any:
    # Only who uses it pays for importing transformers.
    if name in _NEEDS_TRANSFORMERS:
        return getattr(import_module(_NEEDS_TRANSFORMERS[name]), name)
    raise AttributeError(f"module 'moeserve.client' has no attribute {name!r}")
