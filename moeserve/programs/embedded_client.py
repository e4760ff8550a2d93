"""The client without a service in between: a frontend inside this process."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any, Self, Unpack

import torch

from moeserve.addresses import Target, parse_target
from moeserve.api.output import ForwardOutput
from moeserve.api.received import received
from moeserve.api.request import RequestOptions, validate
from moeserve.api.wire import WireRequest, WireResponse, check_request
from moeserve.client import TLS
from moeserve.client.arguments import parse_seconds, parse_token
from moeserve.client.retries import Retries
from moeserve.control.follow import checked_name
from moeserve.errors import DeadlineExceeded, ExpertUnavailable, InvalidRequest, MoEServeError
from moeserve.observe.stats import LayerInfo, ServiceStats
from moeserve.programs.embedded_frontend import SERVER, EmbeddedFrontend
from moeserve.programs.embedded_stream import AnswerStream
from moeserve.programs.embedded_submit import SubmittedCalls
from moeserve.programs.grpc_orders import GrpcOrders
from moeserve.programs.same_user import ask
from moeserve.programs.timing import AWAY_S
from moeserve.server.intake import empty_output


class EmbeddedClient:
    """A frontend in this process, which follows the controller at "host:port" and talks to its hosts itself; share it between threads.

    Methods, arguments, answers and errors are those of `Client`; a call is no gRPC call. `moeserve serve` is a controller; a deployed
    service has one of its own. What a frontend computes is computed by the threads that wait for answers.

    token    the frontend token (controller.frontend_token_file); a service of the same user on the same machine needs none
    tls, timeout, retry    as for `Client`
    name     for people, in `moeserve status`; "" = host name and process

    It follows when first used. Without its controller it serves what it was told last. The checkpoint must be at the same path here,
    because the gate is read from it. After a fork, the child has a frontend of its own if its parent has not used one.
    """

    def __init__(
        self,
        controller: str,
        token: str | None = None,
        tls: TLS | bool | None = None,
        timeout: float | None = 30.0,
        *,
        retry: bool = True,
        name: str = "",
    ) -> None:
        self._made = controller, token, tls, timeout, retry, name
        self._controller = parse_target(controller, "controller")
        self._timeout_s = parse_seconds(timeout, "timeout")
        # Nothing that a frontend keeps may refer to its client, which would never be garbage.
        self._orders = GrpcOrders(controller, partial(_find_token, parse_token(token), self._controller), tls)
        self._submitted = SubmittedCalls()
        self._retry = retry
        self._lock = threading.Lock()
        self._is_closed = False
        self._name = checked_name(name)
        self._frontend: EmbeddedFrontend | None = None
        self._at_end: weakref.finalize[[], EmbeddedClient] | None = None

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
        """As `Client.forward`."""
        routing = used_token, topk_ids, topk_weights, return_routing
        request = WireRequest(hidden_states, layer, *routing, model=model or "", **options)
        return self._forward(request, self._seconds(timeout))

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
        """As `Client.submit`; 64 are in progress at a time, and one that has begun is not given up by cancelling its future."""
        routing = used_token, topk_ids, topk_weights, return_routing
        request = WireRequest(hidden_states, layer, *routing, model=model or "", **options)
        return self._submitted.submit(partial(self._forward, request, self._seconds(timeout)))

    def forward_stream(self, requests: Iterable[WireRequest], timeout: float | None = None) -> Iterator[WireResponse]:
        """As `Client.forward_stream`: up to 64 run side by side, and join batches."""
        yield from AnswerStream(self._forward, requests, self._seconds(timeout))

    def layers(self, timeout: float | None = None) -> list[LayerInfo]:
        """The served MoE layers, in model order."""
        return self._reached(self._seconds(timeout)).catalog.describe()

    def stats(self, timeout: float | None = None) -> ServiceStats:
        """Counts of this frontend since it began."""
        return self._reached(self._seconds(timeout)).engine.stats()

    def ready(self, timeout: float | None = None) -> bool:
        """Whether the controller has been reached, and every expert can be; the first call waits for that for some seconds."""
        try:
            return self._reached(self._seconds(timeout)).is_ready
        except (ExpertUnavailable, DeadlineExceeded):
            return False

    def close(self) -> None:
        """Leaves the controller; running calls raise Cancelled."""
        with self._lock:
            self._is_closed, frontend, self._frontend = True, self._frontend, None
        self._submitted.close()
        if frontend is not None:
            frontend.close()

    def _forward(self, request: WireRequest, timeout_s: float | None) -> ForwardOutput:
        check_request(request)
        as_read, now = received(request), time.monotonic()
        retries = Retries(timeout_s, now)
        while True:
            frontend = self._reached(retries.left_s(now))
            try:
                return _as_own(_answer(frontend, as_read, retries.left_s(time.monotonic())), request.hidden_states.device)
            except MoEServeError as error:
                if not self._retry or (pause_s := retries.pause_s(error, time.monotonic())) is None:
                    raise
            time.sleep(pause_s)
            now = time.monotonic()

    def _seconds(self, timeout: Any) -> float | None:
        return self._timeout_s if timeout is None else parse_seconds(timeout, "timeout", InvalidRequest)

    def _reached(self, timeout_s: float | None) -> EmbeddedFrontend:
        frontend = self._frontend
        if frontend is None or frontend.is_over or frontend.is_of_a_parent:
            frontend = self._begun(frontend)
        frontend.reach(timeout_s)
        return frontend

    def _begun(self, last: EmbeddedFrontend | None) -> EmbeddedFrontend:
        """A frontend in the place of the last one, which cannot go on."""
        if last is not None and last.is_of_a_parent:
            raise MoEServeError(
                f"this process was forked after its parent had used this client of {self._controller.text}, whose frontend stayed there: "
                'use it only after the fork, or start processes by "spawn"'
            )
        with self._lock:
            if self._is_closed:
                raise MoEServeError(f"this client of {self._controller.text} is closed")
            if self._frontend is None or self._frontend is last:
                invitation = ask(self._controller)
                node = "" if invitation is None else invitation.node
                self._frontend = EmbeddedFrontend(self._orders, self._name, node, AWAY_S if self._retry else 0.0)
                if self._at_end is not None:
                    self._at_end.detach()  # it would keep the last one
                self._at_end = weakref.finalize(self, self._frontend.close_soon)
                self._at_end.atexit = False
            begun = self._frontend
        if last is not None:
            last.close_soon()
        return begun

    def __reduce__(self) -> tuple[Any, ...]:
        return _made, self._made

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _made(controller: str, token: str | None, tls: TLS | bool | None, timeout: float | None, retry: bool, name: str) -> EmbeddedClient:
    return EmbeddedClient(controller, token, tls, timeout, retry=retry, name=name)


def _find_token(token: str, controller: Target) -> str:
    """The one that was given, or else the one that the controller gives to programs of its user."""
    invitation = None if token else ask(controller)
    return token if invitation is None else invitation.token


def _answer(frontend: EmbeddedFrontend, request: WireRequest, timeout_s: float | None) -> ForwardOutput:
    """What the service does with a request that it has read: counted, resolved, validated, run."""
    code, began = "OK", time.monotonic()
    try:
        layer = frontend.catalog.resolve(request.model, request.layer)
        spec = frontend.catalog.layers[layer]
        read = validate(request.for_layer(None if timeout_s is None else began + timeout_s, ""), spec, SERVER.max_tokens_per_request)
        return frontend.run(layer, read) if read.num_tokens else empty_output(read, spec, frontend.engine.revision(layer))
    except MoEServeError as error:
        code = error.code.name
        raise
    except BaseException:
        code = "CANCELLED"
        raise
    finally:
        frontend.metrics.observe_call("Forward", code, time.monotonic() - began)


def _as_own(output: ForwardOutput, device: torch.device) -> ForwardOutput:
    """Tensors that the caller may change, and use outside of inference mode, where its own are."""
    own: dict[str, Any] = {name: value.to(device, copy=True) for name, value in vars(output).items() if isinstance(value, torch.Tensor)}
    return replace(output, **own)
