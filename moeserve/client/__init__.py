"""Calling a service; nothing here knows the engine."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from moeserve.client.answers import LayerInfo
from moeserve.client.async_client import AsyncClient
from moeserve.client.client import Client
from moeserve.client.connection import TLS
from moeserve.wire import WireRequest, WireResponse

if TYPE_CHECKING:
    from moeserve.client.hf import connect_experts

__all__ = ["TLS", "AsyncClient", "Client", "LayerInfo", "WireRequest", "WireResponse", "connect_experts"]


def __getattr__(name: str) -> Any:
    # Only who uses it pays for importing transformers.
    if name == "connect_experts":
        return import_module("moeserve.client.hf").connect_experts
    raise AttributeError(f"module 'moeserve.client' has no attribute {name!r}")
