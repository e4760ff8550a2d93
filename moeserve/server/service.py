"""`moeserve.v1.MoEService`: bytes in, a validated request to the engine, bytes out.

T tokens, H hidden size, E experts, K choices per token.
"""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import Any, Final

import grpc

from moeserve.api.call_trace import CallTrace
from moeserve.api.together import join, split_requests
from moeserve.api.wire import WireRequest, decode_forward_request, encode_forward_response, request_id_of
from moeserve.errors import ExpertUnavailable, InvalidRequest, MoEServeError
from moeserve.observe.records import to_message
from moeserve.server.boundary import Observe
from moeserve.server.intake import Intake, deadline_of
from moeserve.server.memories import Memories
from moeserve.server.rpc import Context
from moeserve.server.status import as_user_error
from moeserve.server.stream import answer_all
from moeserve.server.tracing import Tracing
from moeserve.server.transfers import Transfers
from moeserve.v1 import moe_service_pb2 as pb
from moeserve.v1 import tensor_pb2

SERVICE_NAME: Final = pb.DESCRIPTOR.services_by_name["MoEService"].full_name


class MoEService:
    """Handlers that raise MoEServeError; the `Boundary` around them makes it a status.

    Forward messages arrive and leave as raw bytes: a deserializer inside gRPC could only fail with INTERNAL.
    """

    def __init__(self, intake: Intake, observe: Observe, draining: asyncio.Event, transfers: Transfers) -> None:
        self._intake = intake
        self._observe = observe
        self._draining = draining
        self.tracing = Tracing()
        self._transfers = transfers
        self.memories = Memories()

    def handlers(self) -> grpc.GenericRpcHandler:
        """Handlers for a server."""
        return grpc.method_handlers_generic_handler(
            SERVICE_NAME,
            {
                "Forward": grpc.unary_unary_rpc_method_handler(self.forward),
                "ForwardStream": grpc.stream_stream_rpc_method_handler(self.forward_stream),
                "ForwardMany": grpc.unary_unary_rpc_method_handler(self.forward_many),
                "OpenMemory": grpc.unary_unary_rpc_method_handler(
                    self.open_memory, pb.OpenMemoryRequest.FromString, pb.OpenMemoryResponse.SerializeToString
                ),
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
        return await self._respond("Forward", message, context)

    async def open_memory(self, _request: pb.OpenMemoryRequest, _context: Context) -> pb.OpenMemoryResponse:
        """Where callers on this machine share memory."""
        return pb.OpenMemoryResponse(socket=self.memories.name)

    async def _respond(self, method: str, message: bytes, context: Context) -> bytes:
        traced = self.tracing.begin(method, context)
        if traced is None:
            return await self._answered(method, message, context, None)
        with traced as trace:
            return await self._answered(method, message, context, trace)

    async def _answered(self, method: str, message: bytes, context: Context, trace: CallTrace | None) -> bytes:
        reply: memoryview | None = None

        def find(shared: pb.SharedBlock, rows: tensor_pb2.Tensor) -> memoryview:
            nonlocal reply
            given, reply = self.memories.block(shared, rows)
            if len(given) > self._intake.max_bytes:
                raise InvalidRequest(
                    f"{len(given)} bytes of hidden_states are larger than max_message_bytes = {self._intake.max_bytes}", "hidden_states"
                )
            return given

        request = decode_forward_request(message, find if method == "Forward" else None)
        if reply is None:
            return await self._run(request, context, trace, None)
        nbytes = len(reply)
        self._transfers.budget.take(nbytes, own=len(message))
        try:
            return await self._run(request, context, trace, reply)
        finally:
            self._transfers.budget.add(-nbytes)

    async def _run(self, request: WireRequest, context: Context, trace: CallTrace | None, reply: memoryview | None) -> bytes:
        output = await self._intake.run(request, context, deadline_of(context), trace=trace)
        answer = self._intake.sendable(encode_forward_response(request.request_id, output, reply))
        if trace is not None:
            trace.mark("encode")
        return answer

    async def forward_stream(self, _messages: Any, context: Context) -> None:
        """Requests run side by side, answers leave as they finish; a request that fails is answered by its error.

        When the service drains, requests that were read are still answered, then the stream ends with UNAVAILABLE.
        """
        answer = partial(self._answer, "ForwardStream", context)
        if not await answer_all(context, answer, self._draining, self._transfers, self._intake.max_bytes):
            raise ExpertUnavailable("the service is draining; unanswered requests of this stream were not run")

    async def forward_many(self, message: bytes, context: Context) -> bytes:
        """Requests that came together start together, and their answers leave together."""
        engine, _ = self._intake.served()
        parts = split_requests(message)
        with engine.together():
            tasks = [asyncio.create_task(self._answer("ForwardMany", context, part, None)) for part in parts]
            try:
                await asyncio.sleep(0)  # until each of them has reached the engine
            except asyncio.CancelledError:
                for task in tasks:
                    task.cancel()
                raise
        return join(await asyncio.gather(*tasks))

    async def list_layers(self, _request: pb.ListLayersRequest, _context: Context) -> pb.ListLayersResponse:
        """The served layers, in model order."""
        _, catalog = self._intake.served()
        return pb.ListLayersResponse(model=catalog.model, layers=[to_message(pb.LayerInfo, layer) for layer in catalog.describe()])

    async def get_stats(self, _request: pb.GetStatsRequest, _context: Context) -> pb.GetStatsResponse:
        """The engine's counts, now."""
        engine, _ = self._intake.served()
        answer = to_message(pb.GetStatsResponse, engine.stats())
        for index, layer in enumerate(answer.layers):
            layer.index = index
        return answer

    async def _answer(self, method: str, context: Context, message: bytes, refusal: MoEServeError | None) -> bytes:
        code, start = grpc.StatusCode.OK, time.perf_counter()
        try:
            if refusal is not None:  # not raised: this frame has it, and it would have this frame, with the message
                code, answer = _told(method, request_id_of(message), refusal)
                return answer
            return await self._respond(method, message, context)
        except asyncio.CancelledError:
            code = grpc.StatusCode.CANCELLED
            raise
        except Exception as error:
            code, answer = _told(method, request_id_of(message), error)
            return answer
        finally:
            self._observe(method, code.name, time.perf_counter() - start)


def _told(method: str, request_id: str, error: Exception) -> tuple[grpc.StatusCode, bytes]:
    """Status and sentence for the caller. The error is not kept: it refers to the frame that keeps it, and so to the message."""
    known = as_user_error(error, method)
    return known.code, encode_forward_response(request_id, known)
