"""`inference.GRPCInferenceService`: requests of another protocol through the same intake as those of `moeserve.v1.MoEService`."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import grpc
import torch

from moeserve.api.output import ForwardOutput
from moeserve.api.protobuf import Buffer
from moeserve.api.wire import WireRequest
from moeserve.errors import ExpertUnavailable, InvalidRequest, MoEServeError
from moeserve.files.version import running_version
from moeserve.server.boundary import Observe
from moeserve.server.inference import models
from moeserve.server.inference.decoding import InferMessage, InferRequest, WantedOutput, decode, id_of, parse
from moeserve.server.inference.encoding import VERSION, encode, failed_in_stream, in_stream
from moeserve.server.inference.messages import SERVICE_NAME, pb
from moeserve.server.inference.shared_memory import SharedMemory
from moeserve.server.inference.statistics import LayerStatistics
from moeserve.server.intake import Intake, deadline_of
from moeserve.server.rpc import Context, Handler
from moeserve.server.status import as_user_error
from moeserve.server.stream import InOrder, answer_all
from moeserve.server.transfers import Transfers

_EXTENSIONS: Final = ("model_configuration", "parameters", "statistics")


class InferenceService:
    """Handlers that raise MoEServeError; the `Boundary` around them makes it a status.

    `why_not_ready` says of a layer, or with "" of the service, why it is not ready; "" = it is.
    """

    def __init__(
        self,
        intake: Intake,
        transfers: Transfers,
        shared_memory: SharedMemory,
        draining: asyncio.Event,
        observe: Observe,
        why_not_ready: Callable[[str], str],
    ) -> None:
        self._intake, self._transfers, self._shared_memory = intake, transfers, shared_memory
        self._draining, self._observe, self._why_not_ready = draining, observe, why_not_ready
        self._statistics: defaultdict[int, LayerStatistics] = defaultdict(LayerStatistics)

    def handlers(self) -> grpc.GenericRpcHandler:
        """Handlers for a server."""
        unary = {
            "ServerLive": (self._server_live, pb.ServerLiveRequest),
            "ServerReady": (self._server_ready, pb.ServerReadyRequest),
            "ModelReady": (self._model_ready, pb.ModelReadyRequest),
            "ServerMetadata": (self._server_metadata, pb.ServerMetadataRequest),
            "ModelMetadata": (self._model_metadata, pb.ModelMetadataRequest),
            "ModelConfig": (self._model_config, pb.ModelConfigRequest),
            "ModelStatistics": (self._model_statistics, pb.ModelStatisticsRequest),
            "RepositoryIndex": (self._repository_index, pb.RepositoryIndexRequest),
            **self._shared_memory.methods(),
        }
        handlers: dict[str, Handler] = {
            name: grpc.unary_unary_rpc_method_handler(method, request.FromString, lambda answer: answer.SerializeToString())
            for name, (method, request) in unary.items()
        }
        # Their messages arrive as bytes: they are counted, and refused before they are read where there is no room.
        handlers["ModelInfer"] = grpc.unary_unary_rpc_method_handler(self._model_infer)
        handlers["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(self._model_stream_infer)
        return grpc.method_handlers_generic_handler(SERVICE_NAME, handlers)

    async def _model_infer(self, message: bytes, context: Context) -> bytes:
        return self._intake.sendable(b"".join(await self._infer(parse(message), context)))

    async def _model_stream_infer(self, _messages: Any, context: Context) -> None:
        """Requests run side by side; a request that fails is answered by its error."""
        order = InOrder()

        def answer(message: bytes, refusal: MoEServeError | None) -> Any:
            return order.after(partial(self._answer, context, message, refusal))

        if not await answer_all(context, answer, self._draining, self._transfers, self._intake.max_bytes):
            raise ExpertUnavailable("the service is draining; unanswered requests of this stream were not run")

    async def _answer(self, context: Context, message: bytes, refusal: MoEServeError | None) -> bytes:
        code, start, request_id = grpc.StatusCode.OK, time.perf_counter(), ""
        try:
            if refusal is not None:  # not raised: this frame has it, and it would have this frame, with the message
                code, answer = _told(id_of(message), refusal)
                return answer
            parsed = parse(message)
            request_id = parsed.parsed.id
            return self._intake.sendable(b"".join(in_stream(await self._infer(parsed, context))))
        except asyncio.CancelledError:
            code = grpc.StatusCode.CANCELLED
            raise
        except Exception as error:
            code, answer = _told(request_id, error)
            return answer
        finally:
            self._observe("ModelStreamInfer", code.name, time.perf_counter() - start)

    async def _infer(self, message: InferMessage, context: Context) -> list[Buffer]:
        """The response in pieces."""
        named, (_, catalog) = message.parsed, self._intake.served()
        layer = models.find(catalog, named.model_name, named.model_version)
        with self._statistics[layer].request() as stages:
            request = decode(message)
            deadline = _deadline(context, request.options.timeout_s)
            async with self._shared_memory.tensors(request, context, message.nbytes) as shared:
                given: dict[str, Any] = {**request.tensors, **shared, **request.options.gating}
                wire = WireRequest(layer=layer, return_routing=any(wanted.output.is_routing for wanted in request.wanted), **given)
                stages.decoded = time.monotonic_ns()
                output = await self._intake.run(wire, context, deadline, stages.batch)
            stages.computed = time.monotonic_ns()
            answer = _selected(request, output)
            await self._shared_memory.write(answer)
            return encode(named, answer, is_typed=request.is_typed)

    async def _server_live(self, _request: pb.ServerLiveRequest, _context: Context) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    async def _server_ready(self, _request: pb.ServerReadyRequest, _context: Context) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=not self._why_not_ready(""))

    async def _model_ready(self, request: pb.ModelReadyRequest, _context: Context) -> pb.ModelReadyResponse:
        if not self._intake.is_serving:
            return pb.ModelReadyResponse(ready=False)
        _, catalog = self._intake.served()
        spec = catalog.layers[models.find(catalog, request.name, request.version)]
        return pb.ModelReadyResponse(ready=not self._why_not_ready(spec.name))

    async def _server_metadata(self, _request: pb.ServerMetadataRequest, _context: Context) -> pb.ServerMetadataResponse:
        extensions = [*_EXTENSIONS, *(["system_shared_memory"] if self._shared_memory.is_on else [])]
        return pb.ServerMetadataResponse(name=models.PLATFORM, version=running_version(), extensions=extensions)

    async def _model_metadata(self, request: pb.ModelMetadataRequest, _context: Context) -> pb.ModelMetadataResponse:
        _, catalog = self._intake.served()
        return models.metadata(request.name, catalog.layers[models.find(catalog, request.name, request.version)])

    async def _model_config(self, request: pb.ModelConfigRequest, _context: Context) -> pb.ModelConfigResponse:
        _, catalog = self._intake.served()
        spec = catalog.layers[models.find(catalog, request.name, request.version)]
        return pb.ModelConfigResponse(config=models.configuration(request.name, spec))

    async def _model_statistics(self, request: pb.ModelStatisticsRequest, _context: Context) -> pb.ModelStatisticsResponse:
        _, catalog = self._intake.served()
        layers = {models.name_of(catalog, layer): layer for layer in range(len(catalog.layers))}
        if request.name:  # callers look for the name that they have asked for, which may be one with the layer's number
            layers = {request.name: models.find(catalog, request.name, request.version)}
        stats = [self._statistics[layer].message(name, VERSION) for name, layer in layers.items()]
        return pb.ModelStatisticsResponse(model_stats=stats)

    async def _repository_index(self, request: pb.RepositoryIndexRequest, _context: Context) -> pb.RepositoryIndexResponse:
        if request.repository_name:
            raise InvalidRequest(f"there is one repository, without a name; got {request.repository_name[:80]!r}", "repository_name")
        _, catalog = self._intake.served()
        reasons = [self._why_not_ready(spec.name) for spec in catalog.layers]
        of = pb.RepositoryIndexResponse.ModelIndex
        listed = [
            of(name=models.name_of(catalog, layer), version=VERSION, state="UNAVAILABLE" if reason else "READY", reason=reason)
            for layer, reason in enumerate(reasons)
            if not (reason and request.ready)
        ]
        return pb.RepositoryIndexResponse(models=listed)


def _deadline(context: Context, timeout_s: float | None) -> float | None:
    """The earlier one of what the call and the request say."""
    deadlines = [deadline_of(context), None if timeout_s is None else time.monotonic() + timeout_s]
    return min((each for each in deadlines if each is not None), default=None)


def _selected(request: InferRequest, output: ForwardOutput) -> list[tuple[WantedOutput, torch.Tensor]]:
    found = []
    for wanted in request.wanted:
        tensor = wanted.output.of(output)
        assert tensor is not None, "what is made only on request was requested"
        found.append((wanted, tensor))
    return found


def _told(request_id: str, error: Exception) -> tuple[grpc.StatusCode, bytes]:
    """Status and answer for the caller. The error is not kept: it refers to the frame that keeps it, and so to the message."""
    known = as_user_error(error, "ModelStreamInfer")
    return known.code, failed_in_stream(str(known), request_id)
