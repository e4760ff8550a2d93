"""The experts of one host, release by release: the experts of a new one are loaded while the old ones are served."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from threading import Lock

import torch

from moeserve.checkpoints import LayerSource, ServedLayers, load_bank, load_experts
from moeserve.config import ServedModel
from moeserve.errors import CheckpointError, ConfigError
from moeserve.experts import ExpertBank, ExpertShard
from moeserve.host.bank_table import BankTable
from moeserve.release import Release

log = logging.getLogger(__name__)


class Holdings:
    """Fills the `bank_table` that the host's loop serves from.

    One thread at a time loads. Others may withdraw meanwhile what it loads: should reading ever end, nothing of it is kept.
    """

    def __init__(self, model: ServedModel, number: int, device: torch.device) -> None:
        self.bank_table = BankTable()
        #: the first epoch that can be served
        self.since_epoch = 0
        #: read so far, of whatever release
        self.experts_read = 0
        self._model = model
        self.number = number
        self._device = device
        self._releases: list[Release] = []
        #: the epoch that is loaded now, unless it has been withdrawn
        self._loading: int | None = None
        self._changing = Lock()

    def begin(self, releases: Sequence[Release]) -> None:
        """Load this host's experts of the releases in force, when it starts.

        Releases whose weights cannot be read any more are left out, if the last can be served. Raises the error of the last one.
        """
        for release in releases:
            try:
                self.take(release)
            except CheckpointError as error:
                if release is releases[-1]:
                    raise
                self.since_epoch = release.epoch + 1
                log.warning("epoch %d cannot be served: %s", release.epoch, error)

    def take(self, release: Release) -> None:
        """Load the experts that `release` adds on this host; then it accepts work of that epoch.

        Raises CheckpointError, CheckpointChanged when files have changed since the release was made, or ConfigError, also when it was
        withdrawn meanwhile; what is served stays as it is then.
        """
        with self._changing:
            if any(taken.epoch >= release.epoch for taken in self._releases):
                return
            before = self._releases[-1] if self._releases else None
            self._loading = release.epoch
        banks = {
            layer: self._bank(source, layer, release, before)
            for layer, source in enumerate(release.sources(ServedLayers.read(self._model)))
            if before is None or _is_changed(before, release, layer, self.number, source.spec.name)
        }
        with self._changing:
            if self._loading != release.epoch:
                raise ConfigError(f"epoch {release.epoch} was withdrawn while it was loaded")
            self._loading = None
            for layer, bank in banks.items():
                self.bank_table.put(layer, release.epoch, bank)
            self._releases.append(release)

    def withdraw(self, epoch: int) -> None:
        """Forget the withdrawn release of `epoch`."""
        with self._changing:
            self._releases = [release for release in self._releases if release.epoch < epoch]
            if self._loading is not None and self._loading >= epoch:
                self._loading = None
            self.bank_table.withdraw(epoch)

    @property
    def is_empty(self) -> bool:
        """Whether no release is loaded."""
        return not self._releases

    def retire(self, epoch: int) -> None:
        """Forget releases before `epoch`."""
        with self._changing:
            self._releases = [release for release in self._releases if release.epoch >= epoch]
            self.bank_table.retire(epoch)

    def _count(self) -> None:
        self.experts_read += 1

    def _bank(self, source: LayerSource, layer: int, release: Release, before: Release | None) -> ExpertBank | None:
        shards = release.placement.layers[layer].shards_on(self.number)
        if not shards:
            return None
        served = None if before is None else self.bank_table.bank(layer, before.epoch)
        if before is None or served is None or before.placement.layers[layer].shards_on(self.number) != shards:
            return self._load(source, shards)
        old, new = before.origins(source.spec.name), release.origins(source.spec.name)
        if old.get(None) != new.get(None):
            return self._load(source, shards)
        changed = [index for index, shard in enumerate(shards) if old.get(shard.expert) != new.get(shard.expert)]
        experts = load_experts(source, [shards[index] for index in changed], self._count)
        try:
            return served.replaced(dict(zip(changed, experts, strict=True)))
        except ConfigError:
            # The new files have weights in another format, so these cannot be computed together with the others.
            return self._load(source, shards)

    def _load(self, source: LayerSource, shards: Sequence[ExpertShard]) -> ExpertBank:
        return load_bank(source, shards, self._device, self._count)


def _is_changed(before: Release, after: Release, layer: int, host: int, name: str) -> bool:
    if before.origins(name) != after.origins(name):
        return True
    return before.placement.layers[layer].shards_on(host) != after.placement.layers[layer].shards_on(host)
