"""A served layer that stands in for the experts of a layer in this process. T tokens, H hidden size."""

from __future__ import annotations

from torch import Tensor

from moeserve.api.output import ForwardOutput
from moeserve.client import Client
from moeserve.errors import ConfigError, UnknownLayer


class RemoteLayer:
    """Layer `layer` (position or name) of the service at `target`, reached when first asked; copies make connections of their own.

    sizes: what the service must say of the layer, by the names of `Client.layers`.
    """

    def __init__(self, target: str | Client, layer: int | str, token: str | None, sizes: dict[str, int]) -> None:
        self._client = target if isinstance(target, Client) else Client(target, token=token)
        self._layer, self._sizes, self._is_known = layer, sizes, False

    def forward(self, rows: Tensor, used_token: Tensor | None, is_training: bool) -> ForwardOutput:
        """rows [T, H] and used_token [T] bool to the service and back.

        Raises ConfigError in training mode and when the served layer is another, UnknownLayer, and whatever the service raises.
        """
        if is_training:
            raise ConfigError("a layer with target= answers in evaluation mode only, because gradients do not travel: call eval() first")
        if not self._is_known:
            self._require_layer()
            self._is_known = True
        return self._client.forward(rows.detach(), layer=self._layer, used_token=used_token)

    def _require_layer(self) -> None:
        served = self._client.layers()
        found = next((layer for layer in served if self._layer in (layer.index, layer.name)), None)
        if found is None:
            raise UnknownLayer(f"there is no layer {self._layer!r}; served: {', '.join(layer.name for layer in served)}")
        for name, size in self._sizes.items():
            if getattr(found, name) != size:
                raise ConfigError(f"served layer {found.name} has {name} = {getattr(found, name)}; this layer has {size}")
