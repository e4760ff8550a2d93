"""A routing of your own, named by import path: `routing = "package.module:Class"`.

The class is built once per configuration, as Class(gating), and called for every batch with a GateInput; it answers a Selection. Choices
of one token must be distinct experts; capacity, drops, counts, weights and losses are taken care of behind it. For example:

    class FirstExperts:
        def __init__(self, gating): self.top_k = gating.top_k
        def __call__(self, gate):
            topk_ids = torch.arange(self.top_k).expand(gate.requests.num_tokens, -1)
            scores = gate.router_logits.softmax(dim=1)
            return Selection(scores, topk_ids, scores.gather(1, topk_ids))
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from typing import Protocol

from torch import Tensor

from moeserve.config import GatingConfig
from moeserve.errors import ConfigError
from moeserve.gating.gate_input import GateInput, Routing, Selection


class RoutingPlugin(Protocol):
    """What a plug-in class must be. It may keep what it was built with, but nothing from batch to batch."""

    def __init__(self, gating: GatingConfig) -> None: ...

    def __call__(self, gate: GateInput) -> Selection: ...


@lru_cache(maxsize=64)
def load_plugin(gating: GatingConfig) -> Routing:
    """The plug-in `gating.routing` names. Raises ConfigError when it cannot be imported."""
    module, _, name = gating.routing.partition(":")
    try:
        plugin: type[RoutingPlugin] = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        sentence = f"gating.routing = {gating.routing!r} cannot be imported: {error}; its module must be installed or on PYTHONPATH"
        raise ConfigError(sentence) from None
    try:
        return _Checked(gating.routing, plugin(gating))
    except TypeError as error:
        raise ConfigError(f"gating.routing = {gating.routing!r} cannot be built as Class(gating): {error}") from None


class _Checked:
    """A plug-in whose choices are looked at before anybody relies on them."""

    def __init__(self, name: str, plugin: Routing) -> None:
        self._name = name
        self._plugin = plugin

    def __call__(self, gate: GateInput) -> Selection:
        selection = self._plugin(gate)
        if not isinstance(selection, Selection):
            raise ConfigError(f"{self._name} answers a {type(selection).__name__}; allowed: a moeserve.gating.Selection")
        topk_ids, num_tokens = selection.topk_ids, gate.requests.num_tokens
        if topk_ids.dim() != 2 or topk_ids.shape[0] != num_tokens or selection.topk_scores.shape != topk_ids.shape:
            raise ConfigError(f"{self._name} must answer topk_ids and topk_scores of shape [{num_tokens}, K], not {list(topk_ids.shape)}")
        if topk_ids.is_floating_point() or topk_ids.is_complex():
            raise ConfigError(f"{self._name} answers topk_ids of {topk_ids.dtype}; allowed: whole numbers")
        topk_ids = topk_ids.long()
        ordered = topk_ids.sort(dim=1).values
        if ((topk_ids < 0) | (topk_ids >= gate.num_experts)).any() or (ordered[:, 1:] == ordered[:, :-1]).any():
            raise ConfigError(f"{self._name} names an expert twice or one that is not there, for the same token")
        used = gate.requests.chosen(topk_ids)
        chosen = None if selection.chosen is None else self._mask("chosen", selection.chosen, used)
        kept = None if selection.kept is None else self._mask("kept", selection.kept, used if chosen is None else chosen)
        return Selection(selection.scores.float(), topk_ids, selection.topk_scores.float(), kept, chosen)

    def _mask(self, name: str, mask: Tensor, within: Tensor) -> Tensor:
        """[T, K] bool: no choice is kept that is not chosen, and none chosen by a token that is not used."""
        if mask.shape != within.shape:
            raise ConfigError(f"{self._name} must answer {name} of shape {list(within.shape)}, not {list(mask.shape)}")
        return mask.bool() & within
