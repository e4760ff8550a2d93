"""The experts of a host, by layer and epoch: while a new placement or new weights are brought in, the old ones are still served."""

from __future__ import annotations

from bisect import bisect_right

from moeserve.experts import LayerBank


class BankTable:
    """Banks by layer number and the epoch from which on they are valid. Written by one thread at a time, read by others."""

    def __init__(self) -> None:
        self._layers: dict[int, tuple[tuple[int, LayerBank | None], ...]] = {}

    def put(self, layer: int, epoch: int, bank: LayerBank | None) -> None:
        """Sets the layer's bank from `epoch` on; None = the host has no experts of it any more."""
        earlier = [(since, held) for since, held in self._layers.get(layer, ()) if since < epoch]
        self._layers[layer] = (*earlier, (epoch, bank))

    def bank(self, layer: int, epoch: int) -> LayerBank | None:
        """The bank at `epoch`; None if the host has no experts of the layer at that epoch."""
        held = self._layers.get(layer, ())
        index = bisect_right([since for since, _ in held], epoch)
        return held[index - 1][1] if index else None

    def withdraw(self, epoch: int) -> None:
        """Removes the banks from `epoch` on: that release was withdrawn."""
        for layer, held in self._layers.items():
            self._layers[layer] = tuple((since, bank) for since, bank in held if since < epoch)

    def retire(self, epoch: int) -> None:
        """Removes the banks that were replaced before `epoch`."""
        for layer, held in self._layers.items():
            current = bisect_right([since for since, _ in held], epoch)
            self._layers[layer] = held[max(0, current - 1) :]
