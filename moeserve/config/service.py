"""The service's configuration, one model per TOML table."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, Field, model_validator

from moeserve.config.activation import Activation
from moeserve.config.autoscaling import AutoscalingConfig
from moeserve.config.balancing import BalancingConfig
from moeserve.config.batching import BatchingConfig, CommunicationConfig
from moeserve.config.cluster import ClusterConfig, ControllerConfig, RayConfig
from moeserve.config.gating import GatingConfig
from moeserve.config.placement import PlacementConfig
from moeserve.config.resilience import LayerResilience, ResilienceConfig
from moeserve.config.server import ServerConfig
from moeserve.config.store import StoreConfig
from moeserve.config.table import Table
from moeserve.config.values import (
    MAX_EXPERTS,
    MAX_LAYERS,
    Dtype,
    Experts,
    File,
    Kernel,
    LayerKey,
    Mixing,
    Name,
    Quantization,
    Size,
    most_copies,
)


class ModelConfig(Table):
    """[model]: the checkpoint folder, or just a name for layers built from configuration."""

    #: the model's name for clients; default: the checkpoint folder's name
    name: Name | None = None
    checkpoint: File | None = None
    #: the model family whose rules the checkpoint follows; unset = as in its config.json
    family: str | None = None
    #: element type of rows, and of weights in full; unset = as stored
    dtype: Dtype | None = None
    #: the quantization of weights of feed-forward experts; unset = as stored, in few bits if they are published so; none = dtype
    quantization: Quantization | None = None
    #: code of feed-forward experts on CPUs: auto = the fastest here, measured at start; torch = its operators; or a compiled kernel
    kernel: Kernel = "auto"
    #: the answer to a token is bitwise the same whatever else is in its batch
    deterministic: bool = False
    #: which MoE layers of the checkpoint to serve, by position or name; unset = all
    layers: Annotated[tuple[LayerKey, ...], Field(strict=False, min_length=1)] | None = None
    #: packages whose classes a checkpoint may name as its experts or its routing, beside those of torch.nn: making one runs its code
    trusted_modules: Annotated[tuple[str, ...], Field(strict=False)] = ()


class SharedExpertConfig(Table):
    """[layers.shared_expert]: an expert for every token, on a host that receives the token anyway."""

    intermediate_size: Size | None = None
    #: "package.module:Class" of an nn.Module that is the expert instead, and what it is made with
    expert: str | None = None
    expert_args: dict[str, Any] = Field(default_factory=dict)
    #: its answer is added as it is, averaged with that of the others, times the sigmoid of a gate of its own, or both parts are weighted by
    #: a softmax of two coefficients
    mixing: Mixing = "add"

    @model_validator(mode="after")
    def _says_what_it_is(self) -> Self:
        if (self.intermediate_size is None) == (self.expert is None):
            raise ValueError("layers.shared_expert needs intermediate_size or expert, and not both")
        if self.expert is None and self.expert_args:
            raise ValueError("layers.shared_expert.expert_args needs layers.shared_expert.expert")
        return self


class LayerConfig(Table):
    """[[layers]]: a seeded random layer, or, beside [model] checkpoint, the changes to the layer of that name (no name = all)."""

    name: Name | None = None
    hidden_size: Size | None = None
    #: one number for all experts, or one for each
    intermediate_size: Size | Annotated[tuple[Size, ...], Field(strict=False, min_length=1, max_length=MAX_EXPERTS)] | None = None
    #: all experts that the gate can choose
    num_experts: Experts | None = None
    #: how many at the end do not compute: first those that return the token itself, then those that return zero
    identity_experts: int = Field(default=0, ge=0, le=MAX_EXPERTS)
    zero_experts: int = Field(default=0, ge=0, le=MAX_EXPERTS)
    activation: Activation = "swiglu"
    bias: bool = False
    #: "package.module:Class" of an nn.Module that is the expert instead, and what it is made with: all alike, or each as its own
    expert: str | None = None
    expert_args: dict[str, Any] | Annotated[tuple[dict[str, Any], ...], Field(strict=False, min_length=1)] = Field(default_factory=dict)
    shared_expert: SharedExpertConfig | None = None
    seed: int = Field(default=0, ge=-(2**63), lt=2**64)
    gating: GatingConfig = GatingConfig()
    resilience: LayerResilience | None = None

    @model_validator(mode="after")
    def _experts_fit_together(self) -> Self:
        idle, experts = self.identity_experts + self.zero_experts, self.num_experts
        if experts is not None and idle >= experts:
            raise ValueError(f"layers.identity_experts + layers.zero_experts are {idle}; allowed: less than layers.num_experts = {experts}")
        sizes = self.intermediate_size
        if isinstance(sizes, tuple) and experts is not None and len(sizes) != experts - idle:
            raise ValueError(
                f"layers.intermediate_size has {len(sizes)} numbers; allowed: one, or one for each of {experts - idle} experts that compute"
            )
        if isinstance(self.expert_args, tuple) and experts is not None and len(self.expert_args) != experts - idle:
            raise ValueError(
                f"layers.expert_args has {len(self.expert_args)} tables; allowed: one, or one for each of {experts - idle} that compute"
            )
        if self.expert is not None and self.intermediate_size is not None:
            raise ValueError("layers.intermediate_size has no meaning with layers.expert: layers.expert_args say how large the module is")
        mixing = None if self.shared_expert is None else self.shared_expert.mixing
        if self.gating.scale_inputs and mixing in ("residual", "average"):
            raise ValueError(f"layers.gating.scale_inputs cannot be combined with shared_expert.mixing = {mixing!r}, which weighs answers")
        if self.expert is None and self.expert_args:
            raise ValueError("layers.expert_args needs layers.expert")
        return self


def _collector(endpoint: str) -> str:
    if not re.fullmatch(r"https?://[^\s/?#]+/?", endpoint):
        raise ValueError(f"observability.otlp_endpoint is {endpoint!r}; allowed: http://host:port or https://host:port")
    return endpoint


class ObservabilityConfig(Table):
    """[observability]: how much detail the metrics carry."""

    #: per-expert series: none, the 32 busiest of each layer, or all; unset = all, or the busiest where all are more than 10,000 series
    expert_detail: Literal["off", "top", "full"] | None = None
    #: where spans of calls are sent, an OTLP collector's gRPC port; unset = nowhere
    otlp_endpoint: Annotated[str, Field(max_length=1024), AfterValidator(_collector)] | None = None


class ServedModel(Table):
    """[model] and [[layers]]: the served model, and all that a host needs to read its experts and to talk to others."""

    model: ModelConfig = ModelConfig()
    layers: Annotated[tuple[LayerConfig, ...], Field(strict=False, max_length=MAX_LAYERS)] = ()
    store: StoreConfig = StoreConfig()
    resilience: ResilienceConfig = ResilienceConfig()

    @property
    def model_name(self) -> str:
        """The model's name for clients."""
        if self.model.name is not None:
            return self.model.name
        return self.model.checkpoint.name if self.model.checkpoint is not None else "moe"

    @model_validator(mode="before")
    @classmethod
    def _one_table_means_every_layer(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("layers"), dict):
            return {**data, "layers": [data["layers"]]}
        return data

    @model_validator(mode="after")
    def _layers_are_complete(self) -> Self:
        if self.model.checkpoint is not None:
            return self
        if self.model.layers is not None:
            raise ValueError("model.layers needs model.checkpoint: it says which of the checkpoint's layers to serve")
        if self.model.family is not None:
            raise ValueError("model.family needs model.checkpoint: it says which family that is of")
        if not self.layers:
            raise ValueError("nothing to serve: give [model] checkpoint or at least one [[layers]]")
        for index, layer in enumerate(self.layers):
            for key in ("hidden_size", "num_experts", *(("intermediate_size",) if layer.expert is None else ())):
                if getattr(layer, key) is None:
                    raise ValueError(f"layers.{index}.{key} is required for a layer without a checkpoint")
        names = [layer.name or f"layers.{index}" for index, layer in enumerate(self.layers)]
        if len(set(names)) != len(names):
            raise ValueError(f"layer names must differ, got {names}")
        return self

    def resilience_of(self, layer: str) -> ResilienceConfig:
        """[resilience] with what [layers.resilience] changes for the served layer of that name."""
        rules = self.resilience
        for index, entry in enumerate(self.layers):
            name = entry.name or (layer if self.model.checkpoint is not None else f"layers.{index}")
            rules = rules.of_layer(entry.resilience) if name == layer else rules
        return rules


class FrontendConfig(ServedModel):
    """The tables that all frontends of a service share."""

    placement: PlacementConfig = PlacementConfig()
    batching: BatchingConfig = BatchingConfig()
    communication: CommunicationConfig = CommunicationConfig()
    observability: ObservabilityConfig = ObservabilityConfig()

    @model_validator(mode="after")
    def _one_host_computes_an_answer(self) -> Self:
        if self.model.deterministic and most_copies(self.placement.copies) > 1:
            raise ValueError(
                f"model.deterministic is true, but placement.copies is {self.placement.copies}; allowed: 1, because load decides which "
                f"copy computes, and so the order of the sums"
            )
        if self.model.deterministic and self.resilience.hedge != "off":
            raise ValueError(
                "model.deterministic is true, but resilience.hedge is 'auto'; allowed: 'off', because the copy that is faster would decide "
                "which answers are added up where"
            )
        return self


Tables = TypeVar("Tables", bound=ServedModel)


class ServiceConfig(FrontendConfig):
    """Everything `moeserve serve` needs."""

    server: ServerConfig = ServerConfig()
    balancing: BalancingConfig = BalancingConfig()
    autoscaling: AutoscalingConfig = AutoscalingConfig()
    controller: ControllerConfig = ControllerConfig()
    cluster: ClusterConfig = ClusterConfig()
    ray: RayConfig = RayConfig()

    @model_validator(mode="after")
    def _threads_join_no_cluster(self) -> Self:
        if self.cluster.kind == "threads" and self.ray.address is not None:
            raise ValueError(f"ray.address is {self.ray.address!r}; with cluster.kind = 'threads' there is no Ray to join")
        return self

    @model_validator(mode="after")
    def _autoscaling_decides_the_number(self) -> Self:
        placing = self.placement
        decided_later = placing.experts_per_host is not None and "num_hosts" not in placing.model_fields_set
        if not decided_later and (refusal := self.autoscaling.refusal(placing.num_hosts)) is not None:
            raise ValueError(refusal)
        return self

    @model_validator(mode="after")
    def _what_is_spilled_has_bounds(self) -> Self:
        if self.store.spill is None:
            return self
        if self.placement.memory_per_host_bytes is None:
            raise ValueError(f"store.spill is {self.store.spill!r}: it needs placement.memory_per_host_bytes")
        if self.placement.gpus_per_host:
            raise ValueError(
                f"store.spill is {self.store.spill!r} and placement.gpus_per_host is {self.placement.gpus_per_host:g}; allowed: 0, because "
                f"only hosts that compute on CPUs read experts when rows need them"
            )
        return self

    @model_validator(mode="after")
    def _one_host_computes_an_answer_always(self) -> Self:
        balancing = self.balancing
        if self.model.deterministic and (balancing.enabled or balancing.extra_copies or balancing.min_copies > 1):
            raise ValueError(
                "model.deterministic is true, but balancing has enabled, extra_copies or min_copies set; allowed: none of them, because "
                "load would decide which host computes, and so the order of the sums"
            )
        return self

    def only(self, kind: type[Tables]) -> Tables:
        """The tables of `kind`: only those that a host, or a frontend, needs."""
        return kind(**{name: getattr(self, name) for name in self.model_fields_set & kind.model_fields.keys()})
