"""`moeserve.v1.MoEService`: bytes in, a validated request to the engine, bytes out.

T tokens, H hidden size, E experts, K choices per token.
"""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import Any, Final

import grpc
import torch

from moeserve.api.output import ForwardOutput
from moeserve.api.request import LayerRequest, validate
from moeserve.api.wire import WireRequest, decode_forward_request, encode_forward_response, request_id_of
from moeserve.config import LayerSpec
from moeserve.errors import ExpertUnavailable, MoEServeError
from moeserve.observe.records import to_message
from moeserve.server.boundary import RESTART_S, Observe
from moeserve.server.callers import caller_of
from moeserve.server.catalog import Catalog
from moeserve.server.engine import Engine
from moeserve.server.rpc import Context
from moeserve.server.status import as_user_error
from moeserve.server.stream import answer_all
from moeserve.server.transfers import Transfers
from moeserve.v1 import moe_service_pb2 as pb

SERVICE_NAME: Final = pb.DESCRIPTOR.services_by_name["MoEService"].full_name


class MoEService:
    """Handlers that raise MoEServeError; the `Boundary` around them makes it a status. UNAVAILABLE until `serve`.

    Forward messages arrive and leave as raw bytes: a deserializer inside gRPC could only fail with INTERNAL.
    """

    def __init__(self, max_tokens: int, max_bytes: int, observe: Observe, draining: asyncio.Event, transfers: Transfers) -> None:
        """max_tokens: of a request. max_bytes: of a message, and of all messages of one stream in progress."""
        self._engine: Engine | None = None
        self._catalog = Catalog("", ())
        self._max_tokens = max_tokens
        self._max_bytes = max_bytes
        self._observe = observe
        self._draining = draining
        self._transfers = transfers
        transfers.refuse_early = self._refuse_early

    def serve(self, engine: Engine) -> None:
        """From now on `engine` answers requests."""
        self._engine, self._catalog = engine, Catalog(engine.model, engine.layers)

    @property
    def epoch(self) -> int:
        """The epoch of the placement in force; 0 = none yet."""
        return self._engine.stats().epoch if self._engine is not None else 0

    def _served(self) -> tuple[Engine, Catalog]:
        if self._engine is None:
            raise ExpertUnavailable("the service is starting and does not yet know what to serve", RESTART_S)
        return self._engine, self._catalog

    def handlers(self) -> grpc.GenericRpcHandler:
        """Handlers for a server."""
        return grpc.method_handlers_generic_handler(
            SERVICE_NAME,
            {
                "Forward": grpc.unary_unary_rpc_method_handler(self.forward),
                "ForwardStream": grpc.stream_stream_rpc_method_handler(self.forward_stream),
                "ListLayers": grpc.unary_unary_rpc_method_handler(
                    self.list_layers, pb.ListLayersRequest.FromString, pb.ListLayersResponse.SerializeToString
                ),
                "GetStats": grpc.unary_unary_rpc_method_handler(
                    self.get_stats, pb.GetStatsRequest.FromString, pb.GetStatsResponse.SerializeToString
                ),
            },
        )

    async def forward(self, message: bytes, context: Context) -> bytes:
        """One `ForwardRequest` -> one `ForwardResponse`."""
        request = decode_forward_request(message)
        return encode_forward_response(request.request_id, await self._run(request, context))

    def _refuse_early(self, context: Context) -> None:
        engine, _ = self._served()
        if refusal := engine.refusal(caller_of(context), _deadline(context)):
            raise refusal

    async def forward_stream(self, _messages: Any, context: Context) -> None:
        """Requests run side by side, answers leave as they finish; a request that fails is answered by its error.

        When the service drains, requests that were read are still answered, then the stream ends with UNAVAILABLE.
        """
        answer = partial(self._answer, context)
        if not await answer_all(context, answer, self._draining, self._transfers, self._max_bytes):
            raise ExpertUnavailable("the service is draining; unanswered requests of this stream were not run")

    async def list_layers(self, _request: pb.ListLayersRequest, _context: Context) -> pb.ListLayersResponse:
        """The served layers, in model order."""
        _, catalog = self._served()
        return pb.ListLayersResponse(model=catalog.model, layers=[to_message(pb.LayerInfo, layer) for layer in catalog.describe()])

    async def get_stats(self, _request: pb.GetStatsRequest, _context: Context) -> pb.GetStatsResponse:
        """The engine's counts, now."""
        engine, _ = self._served()
        answer = to_message(pb.GetStatsResponse, engine.stats())
        for index, layer in enumerate(answer.layers):
            layer.index = index
        return answer

    async def _answer(self, context: Context, message: bytes, refusal: MoEServeError | None) -> bytes:
        code, start = grpc.StatusCode.OK, time.perf_counter()
        try:
            if refusal is not None:
                raise refusal
            request = decode_forward_request(message)
            return encode_forward_response(request.request_id, await self._run(request, context))
        except asyncio.CancelledError:
            code = grpc.StatusCode.CANCELLED
            raise
        except Exception as error:
            code, answer = _told(request_id_of(message), error)
            return answer
        finally:
            self._observe("ForwardStream", code.name, time.perf_counter() - start)

    async def _run(self, wire: WireRequest, context: Context) -> ForwardOutput:
        engine, catalog = self._served()
        layer = catalog.resolve(wire.model, wire.layer)
        spec = catalog.layers[layer]
        request = validate(wire.for_layer(_deadline(context), caller_of(context)), spec, self._max_tokens)
        if not request.num_tokens:
            return _empty_output(request, spec)
        return await engine.forward(layer, request)


def _deadline(context: Context) -> float | None:
    """On this machine's monotonic clock; None = the caller set none."""
    remaining_s = context.time_remaining()
    return None if remaining_s is None else time.monotonic() + remaining_s


def _told(request_id: str, error: Exception) -> tuple[grpc.StatusCode, bytes]:
    """Status and sentence for the caller. The error is not kept: it refers to the frame that keeps it, and so to the message."""
    known = as_user_error(error, "ForwardStream")
    return known.code, encode_forward_response(request_id, known)


def _empty_output(request: LayerRequest, spec: LayerSpec) -> ForwardOutput:
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
        topk_weights=torch.zeros(0, top_k) if request.return_routing else None,
        slots=torch.zeros(0, top_k, dtype=torch.int64) if request.return_routing else None,
        drop_reasons=torch.zeros(0, top_k, dtype=torch.int32) if request.return_routing else None,
    )
