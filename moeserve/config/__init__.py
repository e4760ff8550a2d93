"""The configuration and its reader; no environment, no argv."""

from moeserve.config.activation import LIMITED, Activation, ActivationName, parsed_activation
from moeserve.config.autoscaling import AutoscalingConfig
from moeserve.config.balancing import BalancingConfig
from moeserve.config.batching import BatchingConfig, CommunicationConfig
from moeserve.config.cluster import ClusterConfig, ControllerConfig, RayConfig
from moeserve.config.gating import BY_TOKEN_ID, GatingConfig
from moeserve.config.load import load_config, load_json, load_server
from moeserve.config.overrides import GatingOverrides, override
from moeserve.config.placement import PlacementConfig
from moeserve.config.resilience import ResilienceConfig
from moeserve.config.server import ServerConfig
from moeserve.config.service import (
    FrontendConfig,
    LayerConfig,
    ModelConfig,
    ObservabilityConfig,
    ServedModel,
    ServiceConfig,
    SharedExpertConfig,
)
from moeserve.config.spec import LayerSpec
from moeserve.config.store import StoreConfig
from moeserve.config.values import (
    MAX_EXPERTS,
    MAX_HOSTS,
    MAX_LAYERS,
    MAX_PHYSICAL,
    MAX_SIZE,
    Bits,
    Copies,
    CopyChoice,
    Dtype,
    Kernel,
    Mixing,
    Quantization,
    Strategy,
    most_copies,
)

__all__ = [
    "BY_TOKEN_ID",
    "LIMITED",
    "MAX_EXPERTS",
    "MAX_HOSTS",
    "MAX_LAYERS",
    "MAX_PHYSICAL",
    "MAX_SIZE",
    "Activation",
    "ActivationName",
    "AutoscalingConfig",
    "BalancingConfig",
    "BatchingConfig",
    "Bits",
    "ClusterConfig",
    "CommunicationConfig",
    "ControllerConfig",
    "Copies",
    "CopyChoice",
    "Dtype",
    "FrontendConfig",
    "GatingConfig",
    "GatingOverrides",
    "Kernel",
    "LayerConfig",
    "LayerSpec",
    "Mixing",
    "ModelConfig",
    "ObservabilityConfig",
    "PlacementConfig",
    "Quantization",
    "RayConfig",
    "ResilienceConfig",
    "ServedModel",
    "ServerConfig",
    "ServiceConfig",
    "SharedExpertConfig",
    "StoreConfig",
    "Strategy",
    "load_config",
    "load_json",
    "load_server",
    "most_copies",
    "override",
    "parsed_activation",
]
