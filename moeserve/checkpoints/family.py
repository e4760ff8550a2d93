"""What there is to say about a model family: keys of config.json, its gate, which layers are MoE layers, its layouts on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from moeserve.checkpoints.keys import Config, one_of
from moeserve.checkpoints.layouts import ExpertLayout, Joined, Separate
from moeserve.config import Activation, Mixing

ACTIVATIONS: Final[Mapping[str, Activation]] = {
    "silu": "swiglu",
    "swish": "swiglu",
    "gelu": "geglu",
    "gelu_pytorch_tanh": "geglu_tanh",
}


@dataclass(frozen=True)
class Layout:
    """Names of the tensors of a layer in one way to write a family to disk, all below `prefix`.

    {index} is the layer's, {expert} the expert's. router [E, H]; router_bias and score_correction_bias [E], "" = the family has none;
    expert_table [V, K]: the experts of each token id, for routing = "token_table".
    shared_expert: where the projections of the shared expert are, and shared_names what they are called there: gate ("" = none), up and
    down, or gate and up in one, and down; shared_gate [1, H], for mixing = "sigmoid".
    Biases and a shared expert that a family may have are there when the files have them.
    beside: names at `prefix` that are those of the MoE layer, when the rest of the decoder layer stands there too.
    """

    prefix: str
    experts: ExpertLayout = field(default_factory=Separate)
    router: str = "gate.weight"
    router_bias: str = ""
    score_correction_bias: str = ""
    expert_table: str = ""
    shared_expert: str = "shared_experts"
    shared_names: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    shared_gate: str = "shared_expert_gate.weight"
    beside: tuple[str, ...] = ()

    @property
    def telling(self) -> tuple[str, ...]:
        """Tensors that tell this layout from others with the same router."""
        shared = self.shared_projections.first
        return tuple(name for name in (self.experts.first, self.score_correction_bias, shared) if name)

    @property
    def shared_projections(self) -> ExpertLayout:
        """Where the shared expert is: three tensors, or two with gate and up in one."""
        names = [f"{self.shared_expert}.{name}.weight" if name else "" for name in self.shared_names]
        return Separate(*names) if len(names) == 3 else Joined(*names)


def no_shared_expert(config: Config) -> int:
    """The width of a shared expert that there is not: 0."""
    return 0


def every_layer(config: Config, index: int) -> bool:
    """All layers are MoE layers."""
    return True


def same_for_all(config: Config, index: int) -> Config:
    """No layer has settings of its own."""
    return config


def hidden_act(config: Config) -> Activation:
    """Raises ValueError."""
    return ACTIVATIONS[one_of(config, "hidden_act", tuple(ACTIVATIONS), "silu")]


@dataclass(frozen=True)
class Family:
    """One model family. Functions of config.json raise ValueError with one sentence for what they cannot serve.

    Several names of a key: transformers reads any of them and does not always write the one a model was published with; "a.b" is key b
    of table a, and a list has a number for every layer.
    """

    #: the first whose tensors are there is taken
    layouts: tuple[Layout, ...]
    #: the knobs of GatingConfig, without top_k
    gating: Callable[[Config], Mapping[str, Any]]
    is_moe_layer: Callable[[Config, int], bool] = every_layer
    activation: Callable[[Config], Activation] = hidden_act
    #: intermediate size of the shared expert, 0 = there is none
    shared_size: Callable[[Config], int] = no_shared_expert
    shared_mixing: Mixing | Callable[[Config], Mixing] = "add"
    #: between the projections of the shared expert; None = as in the others
    shared_activation: Callable[[Config], Activation] | None = None
    #: the keys as they hold for one layer, for families where they differ by layer
    of_layer: Callable[[Config, int], Config] = same_for_all
    #: whether the experts may have biases
    bias: bool = False
    #: the key that says whether the shared expert has biases, "" = it has none
    shared_bias: str = ""
    #: keys of claims.py that are about something else in this family
    unrelated: tuple[str, ...] = ()
    #: names of keys in the files of this family -> what its functions and those of its kin call them
    aliases: Mapping[str, str] = field(default_factory=dict)
    num_hidden_layers: tuple[str, ...] = ("num_hidden_layers",)
    #: lists or words with something for each layer, which count in place of that number
    layers_named_by: tuple[str, ...] = ()
    hidden_size: tuple[str, ...] = ("hidden_size",)
    intermediate_size: tuple[str, ...] = ("moe_intermediate_size",)
    num_experts: tuple[str, ...] = ("num_experts", "num_local_experts", "n_routed_experts")
    num_experts_per_tok: tuple[str, ...] = ("num_experts_per_tok",)
    #: how many more experts the gate can choose that answer the token itself, "" = none
    identity_experts: str = ""
    #: what the served layer is called, whatever its files say: as the module in transformers
    layer_name: str = "model.layers.{index}.mlp"

    def mixing(self, config: Config) -> Mixing:
        """How the shared expert is added."""
        return self.shared_mixing if isinstance(self.shared_mixing, str) else self.shared_mixing(config)
