"""The experts of one host, release by release: what a new one needs is loaded beside what is served."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from moeserve.checkpoints import LayerSource, ServedLayers, load_bank, load_experts
from moeserve.config import ServedModel
from moeserve.errors import CheckpointError, ConfigError
from moeserve.experts import ExpertBank
from moeserve.host.bank_table import BankTable
from moeserve.release import Release

log = logging.getLogger(__name__)


class Holdings:
    """Fills the `bank_table` that the host's loop serves from. To be used by one thread, which may be another than the loop's."""

    def __init__(self, model: ServedModel, number: int, device: torch.device) -> None:
        self.bank_table = BankTable()
        #: nothing of earlier releases is here
        self.since_epoch = 0
        self._model = model
        self.number = number
        self._device = device
        self._releases: list[Release] = []

    def begin(self, releases: Sequence[Release]) -> None:
        """Load what this host has in the releases in force, when it starts.

        Those whose weights cannot be read any more are left out where the last of them can be served. Raises what kept that from being so.
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
        """Load what this host has in `release` and not in the one before; work of that epoch can be sent from now on.

        Raises ConfigError, CheckpointError, or CheckpointChanged when files are not those any more that the release was made of; what is
        served stays as it is then.
        """
        if any(taken.epoch >= release.epoch for taken in self._releases):
            return
        before = self._releases[-1] if self._releases else None
        banks = {
            layer: self._bank(source, layer, release, before)
            for layer, source in enumerate(release.sources(ServedLayers.read(self._model)))
            if before is None or _is_changed(before, release, layer, self.number, source.spec.name)
        }
        for layer, bank in banks.items():
            self.bank_table.put(layer, release.epoch, bank)
        self._releases.append(release)

    def withdraw(self, epoch: int) -> None:
        """The release of `epoch` will not be: forget it."""
        self._releases = [release for release in self._releases if release.epoch < epoch]
        self.bank_table.withdraw(epoch)

    @property
    def is_empty(self) -> bool:
        """No release is here that could be served."""
        return not self._releases

    def retire(self, epoch: int) -> None:
        """Nobody asks for what was before `epoch` any more."""
        self._releases = [release for release in self._releases if release.epoch >= epoch]
        self.bank_table.retire(epoch)

    def _bank(self, source: LayerSource, layer: int, release: Release, before: Release | None) -> ExpertBank | None:
        shards = release.placement.layers[layer].shards_on(self.number)
        if not shards:
            return None
        served = None if before is None else self.bank_table.bank(layer, before.epoch)
        if before is None or served is None or before.placement.layers[layer].shards_on(self.number) != shards:
            return load_bank(source, shards, self._device)
        old, new = before.origins(source.spec.name), release.origins(source.spec.name)
        if old.get(None) != new.get(None):
            return load_bank(source, shards, self._device)
        changed = [index for index, shard in enumerate(shards) if old.get(shard.expert) != new.get(shard.expert)]
        experts = load_experts(source, [shards[index] for index in changed])
        try:
            return served.replaced(dict(zip(changed, experts, strict=True)))
        except ConfigError:
            # Held in another way than those they would be computed with: the new files have weights in other bits.
            return load_bank(source, shards, self._device)


def _is_changed(before: Release, after: Release, layer: int, host: int, name: str) -> bool:
    if before.origins(name) != after.origins(name):
        return True
    return before.placement.layers[layer].shards_on(host) != after.placement.layers[layer].shards_on(host)
