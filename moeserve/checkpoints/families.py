"""One table entry per model family: how its config.json and its tensor names read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moeserve.config import GatingConfig

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Layout:
    """Tensor names of one way to write a family to disk: prefix of a layer ({index}), then names below it ({expert}).

    With one tensor per expert, gate and up are apart; stacked, `gate_up` [E, 2I, H] and `down` [E, H, I] hold all experts.
    """

    prefix: str
    router: str = "gate.weight"
    gate: str = "experts.{expert}.gate_proj.weight"
    up: str = "experts.{expert}.up_proj.weight"
    down: str = "experts.{expert}.down_proj.weight"
    gate_up: str = "experts.gate_up_proj"
    stacked_down: str = "experts.down_proj"


@dataclass(frozen=True)
class Family:
    """How one model family is written down: keys of config.json, its gate, which layers are MoE layers, its layouts on disk."""

    intermediate_key: str
    gating: Callable[[Config], GatingConfig]
    is_moe_layer: Callable[[Config, int], bool]
    layouts: tuple[Layout, ...] = (Layout("model.layers.{index}.mlp"),)
    #: what the number of experts may be called: transformers reads either name and does not always write the one it was published with
    num_experts_keys: tuple[str, ...] = ("num_experts", "num_local_experts")
    #: what the served layer is called, whatever its files say
    layer_name: str = "model.layers.{index}.mlp"

    def num_experts_key(self, config: Config) -> str:
        """The name `config` uses, or the usual one when it has none."""
        return next((key for key in self.num_experts_keys if key in config), self.num_experts_keys[0])


def _always_renormalized(config: Config) -> GatingConfig:
    return GatingConfig(top_k=config["num_experts_per_tok"], renormalize="pre_drop")


def _renormalized_if_told(config: Config) -> GatingConfig:
    return GatingConfig(top_k=config["num_experts_per_tok"], renormalize="pre_drop" if config.get("norm_topk_prob", False) else "none")


def _every_layer(config: Config, index: int) -> bool:
    return True


def _sparse_step(config: Config, index: int) -> bool:
    return index not in (config.get("mlp_only_layers") or ()) and (index + 1) % config.get("decoder_sparse_step", 1) == 0


FAMILIES: Mapping[str, Family] = {
    "mixtral": Family(
        num_experts_keys=("num_local_experts", "num_experts"),
        intermediate_key="intermediate_size",
        gating=_always_renormalized,
        is_moe_layer=_every_layer,
        layouts=(
            Layout("model.layers.{index}.mlp"),
            Layout(
                "model.layers.{index}.block_sparse_moe",
                gate="experts.{expert}.w1.weight",
                up="experts.{expert}.w3.weight",
                down="experts.{expert}.w2.weight",
            ),
        ),
    ),
    "olmoe": Family(
        intermediate_key="intermediate_size",
        gating=_renormalized_if_told,
        is_moe_layer=_every_layer,
    ),
    "qwen3_moe": Family(
        intermediate_key="moe_intermediate_size",
        gating=_renormalized_if_told,
        is_moe_layer=_sparse_step,
    ),
}
