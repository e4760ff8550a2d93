"""What can be configured, and reading it; no environment, no argv."""

from moeserve.config.gating import GatingConfig
from moeserve.config.load import load_config
from moeserve.config.service import (
    Activation,
    BatchingConfig,
    CommunicationConfig,
    Dtype,
    LayerConfig,
    ModelConfig,
    ObservabilityConfig,
    PlacementConfig,
    RayConfig,
    ResilienceConfig,
    ServerConfig,
    ServiceConfig,
)
from moeserve.config.spec import LayerSpec

__all__ = [
    "Activation",
    "BatchingConfig",
    "CommunicationConfig",
    "Dtype",
    "GatingConfig",
    "LayerConfig",
    "LayerSpec",
    "ModelConfig",
    "ObservabilityConfig",
    "PlacementConfig",
    "RayConfig",
    "ResilienceConfig",
    "ServerConfig",
    "ServiceConfig",
    "load_config",
]
