"""What the gRPC server needs from the engine that runs batches."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from moeserve.api.output import ForwardOutput
from moeserve.api.request import LayerRequest
from moeserve.config import LayerSpec
from moeserve.errors import Overloaded
from moeserve.observe.stats import ServiceStats


class Engine(Protocol):
    """Runs validated requests. The model, and the names and sizes of the layers, never change."""

    @property
    def model(self) -> str:
        """The name clients may ask for."""
        ...

    @property
    def layers(self) -> Sequence[LayerSpec]:
        """In model order."""
        ...

    async def forward(self, layer: int, request: LayerRequest) -> ForwardOutput:
        """One batch of at least one token through layer number `layer`; raises MoEServeError; cancelled like any task."""
        ...

    def together(self) -> AbstractContextManager[None]:
        """Requests that reach it meanwhile start together at its end: do not wait for them inside."""
        ...

    def refusal(self, caller: str, deadline: float | None) -> Overloaded | None:
        """Why any request of `caller` would be refused now, whatever it asks for; None = it is worth reading."""
        ...

    def revision(self, layer: int) -> int:
        """The `model_revision` of what layer number `layer` answers to requests that begin now."""
        ...

    def stats(self) -> ServiceStats:
        """A snapshot, at once; its layers are those of `layers`, in the same order."""
        ...
