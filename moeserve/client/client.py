"""The blocking client."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, Unpack

from grpc_health.v1 import health_pb2

from moeserve.client.async_client import AsyncClient
from moeserve.client.connection import CALLING, TLS, Reach
from moeserve.client.line import Line
from moeserve.client.memory import CallerMemory, Lent
from moeserve.client.retries import Retries
from moeserve.client.spans import Metadata, call_span, metadata_of
from moeserve.client.stubs import ServiceStubs
from moeserve.client.submitting import Submitter
from moeserve.errors import DeadlineExceeded, ExpertUnavailable, MoEServeError, NotOffered
from moeserve.observe.records import read
from moeserve.observe.stats import LayerInfo, ServiceStats
from moeserve.v1 import moe_service_pb2 as pb

if TYPE_CHECKING:
    from concurrent.futures import Future

    import torch

    from moeserve.api.output import ForwardOutput
    from moeserve.api.request import RequestOptions
    from moeserve.api.wire import WireRequest, WireResponse

log = logging.getLogger(__name__)


class Client:
    """One connection to a service at `target` ("host:port", or a target of gRPC); safe to share between threads.

    token    sent as a bearer token with every call
    tls      None = in the clear, True = the system's authorities, or the files to use
    timeout  seconds a call may take unless the call has its own; None = no limit
    retry    false = every call is made once, and raises what became of it

    It connects when first used, and again whenever the connection is lost: after any outage, it finds the service within
    seconds. Copies, and clients unpickled in another process (with the token), make connections of their own.

    Every call raises the MoEServeError the service raised, with its sentence; ExpertUnavailable also when the service
    cannot be reached (after a few attempts), DeadlineExceeded when no answer came in time. `forward` first tries again, within its timeout:
    after Overloaded when the service says, while a service restarts (five seconds if it has never answered this client, 30 if a call has no
    timeout), and a few times while it lacks experts. Invalid arguments raise ConfigError here and InvalidRequest in calls.
    """

    def __init__(
        self, target: str, token: str | None = None, tls: TLS | bool | None = None, timeout: float | None = 30.0, *, retry: bool = True
    ) -> None:
        self._line = Line(Reach(target, token, tls, timeout, CALLING), ServiceStubs)
        self._retry = retry
        self._memory = CallerMemory(self._line.reach.target)
        self._submitter = Submitter(partial(AsyncClient, target, token, tls, timeout, retry=retry))

    def forward(
        self,
        hidden_states: torch.Tensor,
        layer: int | str = 0,
        used_token: torch.Tensor | None = None,
        topk_ids: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        return_routing: bool = False,
        model: str | None = None,
        timeout: float | None = None,
        **options: Unpack[RequestOptions],
    ) -> ForwardOutput:
        """hidden_states [T, H] float32, float16 or bfloat16 through one MoE layer; the answer is on the same device.

        layer        position among the served MoE layers, or name
        used_token   [T] bool; false = not routed, its output is zeros, and its rows in the other tensors may hold anything
        topk_ids     [T, K] int and topk_weights [T, K] float: the caller's routing, instead of the gate; id -1 = no choice
        token_ids    [T] int, 0..2^32-1; layers with routing = "hash" or "token_table" need them

        These replace the layer's gating for this request, if its `request_overrides` allow it:
        capacity_factor  more than 0; math.inf = no limit
        noise            "none", "jitter", "rsample", "gumbel_second", "normal" or "uniform", at its default noise_scale unless it is the
                         layer's own; seed of the request's random numbers
        """
        from moeserve.client import answers  # noqa: PLC0415

        routing = used_token, topk_ids, topk_weights, return_routing
        request, now = answers.make_call(hidden_states, layer, *routing, model, **options), time.monotonic()
        retries = Retries(self._line.timeout_s(timeout), now)
        if self._memory.is_wanted(hidden_states):
            self._open_memory(retries)
            now = time.monotonic()
        with call_span("Forward", self._line.reach) as metadata:
            lent = self._memory.lend(hidden_states)
            if lent is not None:
                try:
                    return self._answer(request, retries, now, metadata, lent)
                except BaseException as error:
                    if not self._memory.lost(lent, error):
                        raise
                now = time.monotonic()
            return self._answer(request, retries, now, metadata)

    def submit(
        self,
        hidden_states: torch.Tensor,
        layer: int | str = 0,
        used_token: torch.Tensor | None = None,
        topk_ids: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        return_routing: bool = False,
        model: str | None = None,
        timeout: float | None = None,
        **options: Unpack[RequestOptions],
    ) -> Future[ForwardOutput]:
        """`forward`, without waiting for its answer, which is the result of the future; its errors are raised there.

        Several calls are in progress at a time, and their answers come in any order; small ones that are submitted at the same time travel
        in one message. While 256 are in progress, it waits until one of them is answered, but not in a callback of a future. Do not change
        the tensors before the answer is there. Cancelling the future gives the call up.
        """
        routing = used_token, topk_ids, topk_weights, return_routing
        return self._submitter.submit(hidden_states, layer, *routing, model, timeout, **options)

    def forward_stream(self, requests: Iterable[WireRequest], timeout: float | None = None) -> Iterator[WireResponse]:
        """Many requests over one call; answers come as they finish, so give each request a `request_id`.

        A failed request yields its error; the others continue. `requests` is consumed in another thread while answers
        are read; its exception is raised here, after the answers to its earlier requests. `timeout` is for the whole stream.
        Answers are on the device of the first request.
        """
        from moeserve.client.answers import SentRequest, decode_answer  # noqa: PLC0415

        sent = SentRequest()
        with self._line.call(timeout) as call:
            answers = call.stubs.forward_stream(sent.encoded(requests), timeout=call.timeout_s, metadata=metadata_of(self._line.reach))
            try:
                for data in answers:
                    yield decode_answer(data, sent.device)
            finally:
                answers.cancel()
        sent.raise_error()

    def layers(self, timeout: float | None = None) -> list[LayerInfo]:
        """The served MoE layers, in model order."""
        return [read(LayerInfo, layer) for layer in self._call("list_layers", pb.ListLayersRequest(), timeout).layers]

    def stats(self, timeout: float | None = None) -> ServiceStats:
        """Counts since the service started."""
        return read(ServiceStats, self._call("get_stats", pb.GetStatsRequest(), timeout))

    def ready(self, timeout: float | None = None) -> bool:
        """Whether the service can be reached and serves every layer: one question, without waiting."""
        try:
            answer = self._call("check_health", health_pb2.HealthCheckRequest(), timeout)
        except (ExpertUnavailable, DeadlineExceeded):
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def close(self) -> None:
        """Closes the connection; running calls raise Cancelled, and futures are cancelled."""
        self._memory.close()
        self._submitter.close()
        channel = self._line.close()
        if channel is not None:
            channel.close()

    def _open_memory(self, retries: Retries) -> None:
        try:
            name = self._within("open_memory", pb.OpenMemoryRequest(), retries.left_s(time.monotonic())).socket
        except NotOffered as error:
            self._memory.refuse(str(error))
        except MoEServeError as error:
            log.debug("large tensors travel in messages for now: %s", error)
        else:
            self._memory.open(name, retries.left_s(time.monotonic()))

    def _answer(self, request: WireRequest, retries: Retries, now: float, metadata: Metadata, lent: Lent | None = None) -> ForwardOutput:
        from moeserve.client import answers  # noqa: PLC0415

        data = self._forward(answers.encode_call(request, lent), retries, now, metadata)
        return answers.output_of(answers.decode_answer(data, request.hidden_states.device, lent))

    def _forward(self, message: bytes, retries: Retries, now: float, metadata: Metadata) -> bytes:
        while True:
            try:
                return self._within("forward", message, retries.left_s(now), metadata)  # type: ignore[no-any-return]
            except MoEServeError as error:
                pause_s = retries.pause_s(error, time.monotonic(), is_known=self._line.is_known) if self._retry else None
                if pause_s is None:
                    raise retries.ended(error) from None
            time.sleep(pause_s)
            now = time.monotonic()

    def _call(self, method: str, message: Any, timeout: float | None) -> Any:
        return self._within(method, message, self._line.timeout_s(timeout))

    def _within(self, method: str, message: Any, timeout_s: float | None, metadata: Metadata | None = None) -> Any:
        """timeout_s: None = without limit."""
        with self._line.within(timeout_s) as call:
            return getattr(call.stubs, method)(message, timeout=call.timeout_s, metadata=metadata or self._line.reach.metadata)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
