"""The experts of one host, each held once whatever releases need it: a bank is a list of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch

from moeserve.checkpoints import LayerSource, bank_form, load_experts, make_bank
from moeserve.config import LayerSpec
from moeserve.experts import Expert, ExpertBank, HeldExpert, LayerBank, Placer
from moeserve.host.expert_cache import ExpertCache, Loadable
from moeserve.host.expert_key import ExpertKey
from moeserve.host.layer_reader import LayerReader
from moeserve.host.spilled_bank import SpilledBank


class HeldLayer(NamedTuple):
    """A layer in one release: the key of each expert of its bank."""

    keys: tuple[ExpertKey, ...]
    bank: LayerBank


class ExpertStore:
    """Holds what the releases in force need, and nothing else: an expert is freed with the last of them.

    With a `cache`, what the releases need is in memory as far as there is room; the rest is read when rows need it.

    One thread at a time may change it, while others read.
    """

    def __init__(self, device: torch.device, cache: ExpertCache | None = None) -> None:
        self.cache = cache
        self._device = device
        self._placers: dict[str, Placer] = {}
        #: layers by name, by epoch; replaced, never changed
        self._releases: Mapping[int, Mapping[str, HeldLayer]] = {}

    def load(
        self, source: LayerSource, keys: tuple[ExpertKey, ...], on_expert: Callable[[], None], renew: Callable[[], LayerSource]
    ) -> HeldLayer:
        """A layer with these experts, which `source` has. Those that are missing are read, one at a time; the others are shared.

        It is the caller's until `put`: beside what is held, memory has what is missing, and the one that is being read. `on_expert` is
        called after each that has been read, and what it raises ends the loading. Raises ConfigError or CheckpointError.

        With a cache, the first is read in any case, so that a kernel is chosen before rows come, and the others as long as there is room;
        what is read later is of `source`, or of what `renew` makes of the same files.
        """
        known = [layers[source.spec.name] for layers in self._releases.values() if source.spec.name in layers]
        for layer in known:
            if layer.keys == keys:
                return layer
        if self.cache is not None:
            return HeldLayer(keys, self._spilled(self.cache, LayerReader(source, renew), keys, on_expert))
        held = {key: expert for layer in known for key, expert in _experts(layer).items()}
        missing = [key for key in dict.fromkeys(keys) if key not in held]
        for is_shared in (False, True):
            wanted = [key for key in missing if (key.shard is None) is is_shared]
            placed = self._placer(source.spec).placed(load_experts(source, [key.shard for key in wanted], on_expert), one_by_one=is_shared)
            held.update(zip(wanted, placed, strict=True))
        shared = keys[-1] if keys[-1].shard is None else None
        experts = [held[key] for key in keys if key is not shared]
        return HeldLayer(keys, make_bank(source, experts, None if shared is None else held[shared], self._device))

    def put(self, epoch: int, layers: Mapping[str, HeldLayer]) -> None:
        """The release of `epoch` needs these layers, by name, and no other."""
        self._releases = {**self._releases, epoch: layers}

    def keep(self, epochs: Callable[[int], bool]) -> None:
        """Releases of other epochs need nothing any more."""
        self._releases = {epoch: layers for epoch, layers in self._releases.items() if epochs(epoch)}
        if self.cache is not None:
            self.cache.keep({key for layers in self._releases.values() for layer in layers.values() for key in layer.keys})

    @property
    def epochs(self) -> list[int]:
        """Those of the releases in force, ascending."""
        return sorted(self._releases)

    @property
    def newest(self) -> Mapping[str, HeldLayer] | None:
        """The layers of the newest release, by name; None = there is none."""
        return self._releases[max(self._releases)] if self._releases else None

    @property
    def nbytes(self) -> int:
        """Bytes of all weights that are held."""
        return sum(expert.nbytes for expert in self.experts.values())

    @property
    def experts(self) -> dict[ExpertKey, HeldExpert]:
        """All that are held: in memory."""
        if self.cache is not None:
            return dict(self.cache.experts)  # type: ignore[arg-type]
        every = (layer for layers in self._releases.values() for layer in layers.values())
        return {key: expert for layer in every for key, expert in _experts(layer).items()}

    def _spilled(self, cache: ExpertCache, reader: LayerReader, keys: Sequence[ExpertKey], on_expert: Callable[[], None]) -> SpilledBank:
        spec = reader.spec
        place = partial(self._place, spec)
        wanted = [Loadable(key, reader.nbytes(key.shard), partial(reader.read, key.shard), partial(place, key)) for key in keys]
        for index, one in enumerate(wanted):
            if not cache.load(one, evicts=not index):
                break
            on_expert()
        return SpilledBank(wanted, bank_form(spec, self._device), cache)

    def _place(self, spec: LayerSpec, key: ExpertKey, expert: Expert) -> HeldExpert:
        return next(self._placer(spec).placed([expert], one_by_one=key.shard is None))

    def _placer(self, spec: LayerSpec) -> Placer:
        return self._placers.setdefault(spec.name, Placer(self._device, spec.kernel, spec.deterministic))


def _experts(layer: HeldLayer) -> dict[ExpertKey, HeldExpert]:
    assert isinstance(layer.bank, ExpertBank), "there is no cache"
    return dict(zip(layer.keys, layer.bank.held, strict=True))
