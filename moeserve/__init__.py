"""moeserve: the experts of Mixture-of-Experts models, served as a fleet of their own."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from moeserve.errors import explained

if TYPE_CHECKING:
    from moeserve import compat as compat
    from moeserve.api.output import ForwardOutput
    from moeserve.client import AsyncClient, Client
    from moeserve.config import GatingConfig, ServiceConfig, load_config
    from moeserve.engines.hf import connect_experts
    from moeserve.engines.hf_loader import load_model
    from moeserve.errors import (
        Cancelled,
        CheckpointError,
        ConfigError,
        DeadlineExceeded,
        ExpertUnavailable,
        InvalidRequest,
        MoEServeError,
        NonFiniteOutput,
        Overloaded,
        PermissionDenied,
        Unauthenticated,
        UnknownLayer,
    )
    from moeserve.gating import Routing, route
    from moeserve.layer import MoELayer
    from moeserve.programs.background import BackgroundService, serve
    from moeserve.programs.embedded_client import EmbeddedClient

#: public name -> module; loaded on first use, so a client never pays for the engine
_HOME = {
    "serve": "moeserve.programs.background",
    "BackgroundService": "moeserve.programs.background",
    "Client": "moeserve.client",
    "AsyncClient": "moeserve.client",
    "EmbeddedClient": "moeserve.programs.embedded_client",
    "connect_experts": "moeserve.engines.hf",
    "load_model": "moeserve.engines.hf_loader",
    "GatingConfig": "moeserve.config",
    "ServiceConfig": "moeserve.config",
    "load_config": "moeserve.config",
    "Routing": "moeserve.gating",
    "route": "moeserve.gating",
    "MoELayer": "moeserve.layer",
    "ForwardOutput": "moeserve.api.output",
    **dict.fromkeys(
        (
            "Cancelled",
            "CheckpointError",
            "ConfigError",
            "DeadlineExceeded",
            "ExpertUnavailable",
            "InvalidRequest",
            "MoEServeError",
            "NonFiniteOutput",
            "Overloaded",
            "PermissionDenied",
            "Unauthenticated",
            "UnknownLayer",
        ),
        "moeserve.errors",
    ),
}

__all__ = [
    "AsyncClient",
    "BackgroundService",
    "Cancelled",
    "CheckpointError",
    "Client",
    "ConfigError",
    "DeadlineExceeded",
    "EmbeddedClient",
    "ExpertUnavailable",
    "ForwardOutput",
    "GatingConfig",
    "InvalidRequest",
    "MoELayer",
    "MoEServeError",
    "NonFiniteOutput",
    "Overloaded",
    "PermissionDenied",
    "Routing",
    "ServiceConfig",
    "Unauthenticated",
    "UnknownLayer",
    "connect_experts",
    "load_config",
    "load_model",
    "route",
    "serve",
]


def __getattr__(name: str) -> Any:
    if name == "compat":
        return import_module("moeserve.compat")
    if name not in _HOME:
        raise AttributeError(f"module 'moeserve' has no attribute {name!r}")
    try:
        return getattr(import_module(_HOME[name]), name)
    except ModuleNotFoundError as error:
        raise explained(error, f"moeserve.{name}") from None


def __dir__() -> list[str]:
    return sorted(__all__)
