"""Hugging Face models whose experts live in a service (transformers >= 5).

    from moeserve import connect_experts                      # registers the implementation "moeserve"
    model = AutoModelForCausalLM.from_pretrained(path, experts_implementation="moeserve")
    connect_experts(model, "127.0.0.1:50051")

The model keeps its router: every call sends tokens with the experts and weights chosen for them.

T tokens, H hidden size, K choices per token; a model may also call with [B, S, H], B sequences of S tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moeserve.client.client import Client
from moeserve.engines.hf_padding import forget_padding, uncompiled, used_rows, watch_padding
from moeserve.errors import ConfigError, MoEServeError
from moeserve.observe.stats import LayerInfo

if TYPE_CHECKING:  # this module is imported while transformers is, which is too early for its models
    from transformers import PreTrainedModel

    from moeserve.programs.embedded_client import EmbeddedClient

AnyClient: TypeAlias = "Client | EmbeddedClient"

#: name of the experts implementation in transformers
IMPLEMENTATION: Final = "moeserve"

# Beside the modules, not on them: a copied or saved model must not drag a connection along.
_connected: Final[WeakKeyDictionary[nn.Module, tuple[AnyClient, int]]] = WeakKeyDictionary()


def connect_experts(model: PreTrainedModel, target: str | AnyClient, *, embedded: bool = False) -> AnyClient:
    """Sends the tokens of every experts module of `model` to the layer of the service that holds these experts.

    Modules and served layers are matched by name ("model.layers.1.mlp.experts" and "model.layers.1.mlp"); when no name
    matches, by order. embedded: `target` is a controller, which an `EmbeddedClient` follows. Returns the client, for the caller to close.
    Raises ConfigError when the model was loaded without experts_implementation="moeserve", or the served layers are not its layers.
    """
    client = client_of(target, embedded)
    modules = experts_of(model) if _is_remote(model) else {}
    if not modules:
        raise ConfigError('the model has no remote experts: load it with from_pretrained(..., experts_implementation="moeserve")')
    try:
        pairs = _match(list(modules), client.layers())
        for name, layer in pairs.items():
            _check_sizes(name, modules[name], layer)
    except MoEServeError:
        if client is not target:
            client.close()
        raise
    _connected.update({modules[name]: (client, layer.index) for name, layer in pairs.items()})
    for module in modules.values():
        if not _is_dispatched(module):
            module.forward = partial(_CALLS[_arguments(module)], module)
    watch_padding(model, modules)
    return client


def client_of(target: Any, embedded: bool) -> AnyClient:
    """A client that was made already, or one of the service at `target`. Raises ConfigError for a target that cannot be one."""
    if is_client(target):
        return target  # type: ignore[no-any-return]  # anything else is refused where it is parsed
    if not embedded:
        return Client(target)
    from moeserve.programs.embedded_client import EmbeddedClient  # noqa: PLC0415 - the engine, which other callers do not need

    return EmbeddedClient(target)


def is_client(target: Any) -> bool:
    """Whether it is a client that was made already. Raises ConfigError for one whose calls are awaited."""
    if inspect.iscoroutinefunction(getattr(target, "forward", None)):
        raise ConfigError(f"target is an {type(target).__name__}, and a model does not await its experts; allowed: a Client, or HOST:PORT")
    return hasattr(target, "forward")


def experts_of(model: nn.Module) -> dict[str, Any]:
    """The modules that hold the experts of an MoE layer each, by name.

    Those that let transformers choose how they are computed, and those of older models that are called in a way we know.
    """
    modules = {name: module for name, module in model.named_modules() if name.rpartition(".")[2] == "experts"}
    return {name: module for name, module in modules.items() if _is_dispatched(module) or _arguments(module) in _CALLS}


@uncompiled
def remote_experts(experts: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
    """What is called instead of the module's own forward: [T, H] or [B, S, H], [.., K], [.., K] -> like hidden_states.

    Rows that are padding by the attention mask are not computed: zeros.
    """
    return _ask(experts, hidden_states, top_k_index, top_k_weights, used_rows(hidden_states.shape[:-1].numel()))


@uncompiled
def _remote_rows(experts: Any, routed_in: torch.Tensor) -> torch.Tensor:
    """As Llama 4 calls its experts: [E * T, H], every token for every expert, weighed, zero for those not chosen -> [E * T, H]."""
    by_expert = routed_in.view(experts.num_experts, -1, routed_in.shape[-1])
    chosen, used = by_expert.any(dim=-1), used_rows(by_expert.shape[1])
    expert, token = (chosen if used is None else chosen & used.to(chosen.device)).nonzero(as_tuple=True)
    rows = by_expert[expert, token]
    answer = torch.zeros_like(by_expert)
    answer[expert, token] = _ask(experts, rows, expert[:, None], torch.ones(len(rows), 1, dtype=torch.float32), None)
    return answer.view(routed_in.shape)


def _ask(
    experts: nn.Module, hidden_states: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, used: torch.Tensor | None
) -> torch.Tensor:
    """used [T] bool, None = all."""
    if experts not in _connected:
        raise ConfigError("the experts of this model are not connected to a service: call moeserve.connect_experts(model, target) first")
    client, layer = _connected[experts]
    try:
        output: torch.Tensor = _Remote.apply(hidden_states, ids, weights, used, client, layer)  # type: ignore[no-untyped-call]
    except BaseException:
        forget_padding()
        raise
    return output


#: arguments of an experts module's forward -> what to call instead
_CALLS: Final[Mapping[tuple[str, ...], Callable[..., torch.Tensor]]] = {
    ("hidden_states", "top_k_index", "top_k_weights"): remote_experts,
    ("hidden_states",): _remote_rows,
}


class _Remote(torch.autograd.Function):
    """Gradients must not silently be missing: requesting them is an error."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        used: torch.Tensor | None,
        client: AnyClient,
        layer: int,
    ) -> torch.Tensor:
        choices = ids.shape[-1]
        output = client.forward(
            hidden_states.reshape(-1, hidden_states.shape[-1]),
            layer=layer,
            used_token=used,
            topk_ids=ids.reshape(-1, choices),
            topk_weights=weights.reshape(-1, choices),
        )
        return output.hidden_states.view(hidden_states.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise MoEServeError("remote experts are for inference: no gradient flows through them")


def _is_remote(model: PreTrainedModel) -> bool:
    configs = {id(config): config for config in (model.config, model.config.get_text_config())}
    return any(getattr(config, "_experts_implementation", None) == IMPLEMENTATION for config in configs.values())


def _is_dispatched(experts: nn.Module) -> bool:
    """Whether transformers calls the chosen implementation instead of their own forward."""
    return hasattr(experts, "has_gate")


def _arguments(experts: nn.Module) -> tuple[str, ...]:
    return tuple(inspect.signature(type(experts).forward).parameters)[1:]


def _match(names: list[str], layers: list[LayerInfo]) -> dict[str, LayerInfo]:
    by_name = {name: layer for name in names if (layer := _layer_of(name, layers)) is not None}
    taken: dict[int, str] = {}
    for name, layer in by_name.items():
        if (other := taken.setdefault(layer.index, name)) != name:
            raise ConfigError(f"{other} and {name} would both be the served layer {layer.name}")
    if len(by_name) == len(names):
        return by_name
    if not by_name and len(names) == len(layers):
        return dict(zip(names, layers, strict=True))
    missing = [name for name in names if name not in by_name]
    raise ConfigError(
        f"the model has {len(names)} MoE layers and the service {len(layers)}; not served: {', '.join(missing[:4])}"
        f"{' and more' if len(missing) > 4 else ''}; served: {', '.join(layer.name for layer in layers[:4])}"
        f"{' and more' if len(layers) > 4 else ''}"
    )


def _layer_of(name: str, layers: list[LayerInfo]) -> LayerInfo | None:
    """The layer of that name, or else the only one at the same place. Raises ConfigError when there are several."""
    found = [layer for layer in layers if _same_place(name, layer.name)]
    found = [layer for layer in found if f"{layer.name}.experts" == name] or found
    if len(found) > 1:
        raise ConfigError(f"{name} may be any of the served layers {', '.join(layer.name for layer in found)}")
    return found[0] if found else None


def _same_place(module: str, layer: str) -> bool:
    """Whether one path ends with the other: wrappers and bare models put different prefixes before the same place."""
    here, there = f".{module.rpartition('.')[0]}", f".{layer}"
    return here.endswith(there) or there.endswith(here)


def _check_sizes(name: str, module: Any, layer: LayerInfo) -> None:
    num_experts, hidden_size = _sizes(module)
    if (num_experts, hidden_size) != (layer.num_experts, layer.hidden_size):
        raise ConfigError(
            f"{name} has {num_experts} experts of hidden size {hidden_size}, the served layer {layer.name} has "
            f"{layer.num_experts} of {layer.hidden_size}"
        )


def _sizes(module: Any) -> tuple[int, int]:
    """E, including experts without weights, and H."""
    if _is_dispatched(module):
        return module.num_experts, module.down_proj.shape[-1 if module.is_transposed else -2]
    hidden_size: int = module.hidden_size if hasattr(module, "hidden_size") else module.hidden_dim
    return getattr(module, "total_experts", None) or module.num_experts, hidden_size


def __getattr__(name: str) -> Any:
    if name != "load_model":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from moeserve.engines.hf_loader import load_model  # noqa: PLC0415  # it needs models of transformers, which may not be there yet

    return load_model


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, remote_experts)
