"""The experts of one host, release by release: the experts of a new one are loaded while the old ones are served."""

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
        #: the first epoch that can be served
        self.since_epoch = 0
        self._model = model
        self.number = number
        self._device = device
        self._releases: list[Release] = []

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

        Raises ConfigError, CheckpointError, or CheckpointChanged when files have changed since the release was made; what is
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
        """Forget the withdrawn release of `epoch`."""
        self._releases = [release for release in self._releases if release.epoch < epoch]
        self.bank_table.withdraw(epoch)

    @property
    def is_empty(self) -> bool:
        """Whether no release is loaded."""
        return not self._releases

    def retire(self, epoch: int) -> None:
        """Forget releases before `epoch`."""
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
            # The new files have weights in another format, so these cannot be computed together with the others.
            return load_bank(source, shards, self._device)


def _is_changed(before: Release, after: Release, layer: int, host: int, name: str) -> bool:
    if before.origins(name) != after.origins(name):
        return True
    return before.placement.layers[layer].shards_on(host) != after.placement.layers[layer].shards_on(host)
