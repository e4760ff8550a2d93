"""Calling a service; nothing here knows the engine."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import wrapt

from moeserve.api.wire import WireRequest, WireResponse
from moeserve.client.admin import AdminClient
from moeserve.client.answers import LayerInfo
from moeserve.client.async_client import AsyncClient
from moeserve.client.client import Client
from moeserve.client.connection import TLS
from moeserve.client.control import ControlClient
from moeserve.client.pipeline import through_layers

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

#: they stand in `engines` now, a floor above
_NEEDS_TRANSFORMERS = {"connect_experts": "moeserve.engines.hf", "load_model": "moeserve.engines.hf_loader"}

# transformers takes seconds to import: "moeserve" becomes known to it when somebody else does, at once if that has happened.
wrapt.register_post_import_hook(lambda _: import_module("moeserve.engines.hf"), "transformers.integrations.moe")


def __getattr__(name: str) -> Any:
    # Only who uses it pays for importing transformers.
    if name in _NEEDS_TRANSFORMERS:
        return getattr(import_module(_NEEDS_TRANSFORMERS[name]), name)
    raise AttributeError(f"module 'moeserve.client' has no attribute {name!r}")
