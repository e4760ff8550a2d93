"""The experts of one host, release by release: the experts of a new one are loaded while the old ones are served."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from threading import Lock

import torch

from moeserve.checkpoints import LayerSource, ServedLayers
from moeserve.config import ServedModel
from moeserve.errors import CheckpointError, ConfigError
from moeserve.host.bank_table import BankTable
from moeserve.host.expert_cache import ExpertCache
from moeserve.host.expert_key import needed
from moeserve.host.expert_store import ExpertStore, HeldLayer
from moeserve.release import Release

log = logging.getLogger(__name__)


class Holdings:
    """Fills the `bank_table` that the host's loop serves from.

    memory_bytes: of weights, None = as many as there are; with store.spill, more experts than that are not kept in memory.

    One thread at a time loads. Others may withdraw meanwhile what it loads: should reading ever end, nothing of it is kept.
    """

    def __init__(self, model: ServedModel, number: int, device: torch.device, memory_bytes: int | None = None) -> None:
        self.bank_table = BankTable()
        #: the first epoch that can be served
        self.since_epoch = 0
        #: experts read so far, of whatever release
        self.experts_read = 0
        self.model, self.number = model, number
        cache = None if model.store.spill is None or memory_bytes is None else ExpertCache(memory_bytes)
        self.store = ExpertStore(device, cache)
        #: what is loaded now, or next, unless it has been retired or withdrawn
        self._coming: list[Release] = []
        self._changing = Lock()

    def begin(self, releases: Sequence[Release]) -> None:
        """Load this host's experts of the releases in force, when it starts. They may change until then.

        Releases whose weights cannot be read any more are left out, if the last can be served, and those that are retired or withdrawn
        meanwhile, if one is left. Raises the error of the last one.
        """
        with self._changing:
            releases = tuple(releases)
            self._coming = [*releases]
        for release in releases:
            try:
                self._load(release)
            except ConfigError as error:
                is_over = release not in self._coming
                if not (is_over or isinstance(error, CheckpointError)):
                    raise
                if release is releases[-1] and not (is_over and self.store.epochs):
                    raise
                if not is_over:
                    self.since_epoch = release.epoch + 1
                    log.warning("epoch %d cannot be served: %s", release.epoch, error)

    def take(self, release: Release) -> None:
        """Load the experts that `release` adds on this host; then it accepts work of that epoch.

        Raises CheckpointError, CheckpointChanged when files have changed since the release was made, or ConfigError, also when it was
        withdrawn meanwhile; what is served stays as it is then.
        """
        with self._changing:
            if any(epoch >= release.epoch for epoch in self.store.epochs):
                return
            self._coming = [release]
        self._load(release)

    def _load(self, release: Release) -> None:
        self._check(release)
        layers = self._loaded(release, self._sources(release))
        with self._changing:
            self._check(release)
            self._coming.remove(release)
            before = self.store.newest
            for layer, (name, held) in enumerate(layers.items()):
                if before is None or before.get(name) is not held:
                    self.bank_table.put(layer, release.epoch, None if held is None else held.bank)
            self.store.put(release.epoch, {name: held for name, held in layers.items() if held is not None})

    def withdraw(self, epoch: int) -> None:
        """Forget the withdrawn release of `epoch`."""
        with self._changing:
            self._coming = [release for release in self._coming if release.epoch < epoch]
            self.bank_table.withdraw(epoch)
            self.store.keep(lambda each: each < epoch)

    @property
    def is_empty(self) -> bool:
        """Whether no release is loaded."""
        return not self.store.epochs

    def retire(self, epoch: int) -> None:
        """Forget releases before `epoch`."""
        with self._changing:
            self._coming = [release for release in self._coming if release.epoch >= epoch]
            self.store.keep(lambda each: each >= epoch)
            if self.store.epochs:
                self.bank_table.retire(self.store.epochs[0])
            else:
                self.bank_table.withdraw(0)

    def _loaded(self, release: Release, sources: Sequence[LayerSource]) -> dict[str, HeldLayer | None]:
        """By name, in model order; None = this host has no experts of the layer."""
        keys = {source.spec.name: needed(release, layer, source.spec, self.number) for layer, source in enumerate(sources)}
        on_expert = partial(self._count, release)

        def load(layer: int, source: LayerSource) -> HeldLayer | None:
            wanted = keys[source.spec.name]
            return self.store.load(source, wanted, on_expert, lambda: self._sources(release)[layer]) if wanted else None

        return {source.spec.name: load(layer, source) for layer, source in enumerate(sources)}

    def _sources(self, release: Release) -> Sequence[LayerSource]:
        return release.sources(ServedLayers.read(self.model))

    def _count(self, release: Release) -> None:
        self.experts_read += 1
        self._check(release)

    def _check(self, release: Release) -> None:
        if release not in self._coming:
            raise ConfigError(f"epoch {release.epoch} was withdrawn while it was loaded")
