"""The one way in for token batches, whatever protocol they came by: layer, deadline, checks, empty batches, the engine.

T tokens, H hidden size, E experts, K choices per token.
"""

from __future__ import annotations

import time

import torch

from moeserve.api import surroundings
from moeserve.api.call_trace import CallTrace
from moeserve.api.output import ForwardOutput
from moeserve.api.request import BatchStart, LayerRequest, validate
from moeserve.api.wire import WireRequest
from moeserve.config import LayerSpec
from moeserve.errors import ExpertUnavailable, InvalidRequest
from moeserve.server.boundary import RESTART_S
from moeserve.server.callers import caller_of
from moeserve.server.catalog import Catalog
from moeserve.server.engine import Engine
from moeserve.server.rpc import Context


class Intake:
    """`max_tokens` of a request; `max_bytes` of a message, and of all messages of one stream in progress. UNAVAILABLE until `serve`."""

    def __init__(self, max_tokens: int, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._max_tokens = max_tokens
        self._engine: Engine | None = None
        self._catalog = Catalog("", ())

    def serve(self, engine: Engine) -> None:
        """From now on `engine` answers requests."""
        self._engine, self._catalog = engine, Catalog(engine.model, engine.layers)

    @property
    def is_serving(self) -> bool:
        """Whether it is known what to serve."""
        return self._engine is not None

    def served(self) -> tuple[Engine, Catalog]:
        """What answers, and its layers. Raises ExpertUnavailable."""
        if self._engine is None:
            raise ExpertUnavailable("the service is starting and does not yet know what to serve", RESTART_S)
        return self._engine, self._catalog

    @property
    def epoch(self) -> int:
        """The epoch of the placement in force; 0 = none yet."""
        return self._engine.stats().epoch if self._engine is not None else 0

    def refuse_early(self, context: Context) -> None:
        """Raises what refuses a call whatever its message brings."""
        engine, _ = self.served()
        if refusal := engine.refusal(caller_of(context), deadline_of(context)):
            raise refusal

    async def run(
        self,
        wire: WireRequest,
        context: Context,
        deadline: float | None,
        begun: BatchStart | None = None,
        trace: CallTrace | None = None,
    ) -> ForwardOutput:
        """The answer. Raises MoEServeError. `begun` is filled in when the batch of the request begins, `trace` as it goes."""
        engine, catalog = self.served()
        layer = catalog.resolve(wire.model, wire.layer)
        spec = catalog.layers[layer]
        request = validate(wire.for_layer(deadline, caller_of(context), begun, trace), spec, self._max_tokens)
        if trace is not None:
            trace.layer, trace.tokens = spec.name, request.num_tokens
            trace.mark("decode")
        output = await engine.forward(layer, request) if request.num_tokens else empty_output(request, spec, engine.revision(layer))
        if trace is not None:
            trace.mark("other")
        return output

    def sendable(self, answer: bytes) -> bytes:
        """`answer`, unless it is larger than gRPC sends, which would end the whole stream. Raises InvalidRequest."""
        if len(answer) > self.max_bytes:
            raise InvalidRequest(f"the answer has {len(answer)} bytes; server.max_message_bytes is {self.max_bytes}")
        return answer


def deadline_of(context: Context) -> float | None:
    """On this machine's monotonic clock; None = the caller set none."""
    remaining_s = context.time_remaining()
    return None if remaining_s is None else time.monotonic() + remaining_s


@surroundings.put_aside()
def empty_output(request: LayerRequest, spec: LayerSpec, revision: int) -> ForwardOutput:
    """The answer to a batch without tokens."""
    counts = torch.zeros(spec.num_experts, dtype=torch.int64)
    top_k = spec.gating.choices_per_token(spec.num_experts) if request.topk_ids is None else request.topk_ids.shape[1]
    return ForwardOutput(
        hidden_states=request.hidden_states,
        requested=counts,
        processed=counts,
        dropped=counts,
        dropped_tokens=torch.zeros(0, dtype=torch.bool),
        aux_loss=0.0,
        z_loss=0.0,
        topk_ids=torch.zeros(0, top_k, dtype=torch.int64) if request.return_routing else None,
        topk_weights=torch.zeros(0, top_k, dtype=torch.float32) if request.return_routing else None,
        slots=torch.zeros(0, top_k, dtype=torch.int64) if request.return_routing else None,
        drop_reasons=torch.zeros(0, top_k, dtype=torch.int32) if request.return_routing else None,
        model_revision=revision,
    )
