"""The gRPC server: what is registered on it, where it listens, how it starts and ends."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

import grpc

from moeserve.addresses import join
from moeserve.config import ServerConfig
from moeserve.errors import ConfigError
from moeserve.loops import in_thread
from moeserve.server.admin import ADMIN_SERVICE_NAME, Admin, AdminService, Identity, PingService, why_incomplete
from moeserve.server.boundary import Boundary, Observe
from moeserve.server.certificates import server_credentials
from moeserve.server.control import CONTROL_SERVICE_NAME, Control, ControlService
from moeserve.server.engine import Engine
from moeserve.server.grpc_log import leave_out_callers_that_left
from moeserve.server.health import HEALTH_SERVICE_NAME, Health
from moeserve.server.inference.messages import SERVICE_NAME as INFERENCE_SERVICE_NAME
from moeserve.server.inference.messages import described
from moeserve.server.inference.service import InferenceService
from moeserve.server.inference.shared_memory import SharedMemory
from moeserve.server.intake import Intake
from moeserve.server.otlp import exporting_to
from moeserve.server.parsing import MAX_REQUEST_BYTES
from moeserve.server.ports import free_port
from moeserve.server.proxy import Proxy, SharedPort
from moeserve.server.security import FrontendTokens, check_exposure, rotating_tokens
from moeserve.server.service import SERVICE_NAME, MoEService
from moeserve.server.transfers import Transfers

#: after the last call has ended: for its answer to leave, and before watchers of the health service are cut off
_FLUSH_S: Final = 3.0
#: for a collector to take the last spans
_SPANS_S: Final = 1.0
#: of a client; one that keeps pinging more often than this is disconnected
_LEAST_PING_INTERVAL_MS: Final = 1_000
#: calls in progress, read or not, of all callers together; the rest is refused with RESOURCE_EXHAUSTED before it is read
_MAX_CALLS: Final = 16384
_MAX_CALLS_OF_A_CONNECTION: Final = 1024
_MAX_CONNECTIONS: Final = 4096
#: how long a connection may have no call, and how long its handshake may take
_IDLE_CONNECTION_MS: Final = 300_000
_HANDSHAKE_MS: Final = 20_000
#: how long a connection may be silent before it is asked whether it lives, and how long it may take to say so
_KEEPALIVE_MS: Final = 30_000
_KEEPALIVE_OF_FOLLOWERS_MS: Final = 10_000
_KEEPALIVE_TIMEOUT_MS: Final = 10_000
Options = Sequence[tuple[str, int]]


class GrpcServer:
    """Serves an `engine` as `config` says; `admin` to callers with the admin token, `control` to frontends with theirs.

    Health is NOT_SERVING until `set_serving` was called for every layer of the engine. `is_starting`: `serve` will bring the engine;
    until then the answer is UNAVAILABLE. `observe` is called for every call with method, status code and seconds. `shared`: another process
    listens at the port already, and has the controller.

    Raises ConfigError for a configuration that it refuses: exposed without protection, unreadable files. Make and use it inside one
    event loop.
    """

    def __init__(
        self,
        config: ServerConfig,
        observe: Observe,
        *,
        engine: Engine | None = None,
        is_starting: bool = False,
        admin: Admin | None = None,
        control: Control | None = None,
        shared: SharedPort | None = None,
    ) -> None:
        has_engine = is_starting or engine is not None
        if has_engine:
            check_exposure(config)
        leave_out_callers_that_left()
        followers = control or shared
        tokens = rotating_tokens(config, FrontendTokens() if followers is None else followers.tokens)
        self._config, self._has_engine, self._is_joining = config, has_engine, shared is not None
        self._where = ("server.host", "server.port") if has_engine else ("controller.control_host", "controller.control_port")
        self._layers: list[str] = []
        self._watching: asyncio.Task[None] | None = None
        self._credentials = server_credentials(config)
        self._transfers = Transfers(config)
        self._boundary = Boundary(tokens, observe, self._transfers)
        # There is one controller, so its connections need no maximum age.
        keepalive_ms = _KEEPALIVE_MS if control is None else _KEEPALIVE_OF_FOLLOWERS_MS
        self._server = self._new_server(_options(config, keepalive_ms), _ages(config) if has_engine else ())
        self._probed = None if config.health_port is None else self._new_server(_options_of_health(config))
        #: health alone in plain text; None = nowhere
        self.health_port = config.health_port
        self._intake = Intake(config.max_tokens_per_request, config.max_message_bytes)
        self._transfers.refuse_early = self._intake.refuse_early
        self._service = MoEService(self._intake, observe, self._boundary.draining, self._transfers)
        services = self._services_of_layers(observe) if has_engine else {}
        if admin is not None and config.admin_token_file is not None:
            draining = self._boundary.draining
            services[ADMIN_SERVICE_NAME] = AdminService(self._identity(admin, has_engine), admin, draining).handlers()
        elif admin is not None or has_engine:
            self._server.add_generic_rpc_handlers((PingService(self._identity(admin, has_engine)).handlers(),))
        if control is not None and control.tokens:
            services[CONTROL_SERVICE_NAME] = ControlService(control.frontends, self._boundary.draining).handlers()
        if shared is not None:
            self._server.add_generic_rpc_handlers((Proxy(shared, self._boundary.draining),))
        self._health = Health(list(services), None if has_engine else ())
        self._server.add_generic_rpc_handlers((*services.values(), self._health.handlers()))
        _reflect(self._server, [*services, HEALTH_SERVICE_NAME])
        if self._probed is not None:
            self._probed.add_generic_rpc_handlers((self._health.handlers(),))
        if engine is not None:
            self.serve(engine)

    def _services_of_layers(self, observe: Observe) -> dict[str, grpc.GenericRpcHandler]:
        config, draining = self._config, self._boundary.draining
        shared_memory = SharedMemory(self._transfers.budget, config)
        inference = InferenceService(self._intake, self._transfers, shared_memory, draining, observe, self._why_not_serving)
        return {
            SERVICE_NAME: self._service.handlers(),
            INFERENCE_SERVICE_NAME: inference.handlers(),
        }

    def _new_server(self, options: Options, ages: Options = ()) -> grpc.aio.Server:
        return grpc.aio.server(interceptors=[self._boundary], options=[*options, *ages], maximum_concurrent_rpcs=_MAX_CALLS)

    def _identity(self, admin: Admin | None, has_engine: bool) -> Identity:
        if admin is None or has_engine:
            return Identity("frontend" if admin is None else "service", self._epoch, self._why_not_serving)
        return Identity("controller", lambda: admin.status().epoch, lambda: why_incomplete(admin.status()))

    def _epoch(self) -> int:
        return self._intake.epoch

    def _why_not_serving(self, layer: str = "") -> str:
        return self._health.why_not_serving(layer)

    def serve(self, engine: Engine) -> None:
        """Serves `engine` from now on."""
        self._layers = [spec.name for spec in engine.layers]
        self._intake.serve(engine)
        self._health.set_layers(self._layers)

    def record_spans(self, endpoint: str) -> None:
        """Sends spans of calls there from now on. Raises ConfigError when OpenTelemetry is not installed."""
        self._service.tracing.provider = exporting_to(endpoint)

    @property
    def queue_bytes(self) -> int:
        """Messages that were read and not answered yet, and answers that were not taken yet."""
        return self._transfers.budget.bytes

    async def start(self) -> int:
        """Listens; returns the port. Raises ConfigError when it cannot listen at the address."""
        host, port = self._config.host, self._config.port
        if not self._is_joining:
            port = await free_port(host, port, *self._where)
        port = self._transfers.arriving.port = await _listen(self._server, host, port, self._credentials, *self._where)
        if self._probed is not None:
            assert self.health_port is not None
            health_port = await free_port(host, self.health_port, "server.host", "server.health_port")
            self.health_port = await _listen(self._probed, host, health_port, None, "server.host", "server.health_port")
        self._watching = asyncio.create_task(self._transfers.watch())
        if self._has_engine:
            self._service.memories.open()
        return port

    def set_serving(self, layer: int, serving: bool) -> None:
        """Sets the health of a layer; the service as a whole is SERVING while every layer is."""
        self._health.set_serving(self._layers[layer], serving)

    async def drain(self, timeout_s: float) -> None:
        """Ends the service: NOT_SERVING, new calls refused with UNAVAILABLE, running ones may finish; then it stops.

        Calls still running after `timeout_s` are cancelled.
        """
        self._health.drain()
        self._boundary.drain()
        try:
            await asyncio.wait_for(self._boundary.idle(), timeout_s)
        except TimeoutError:
            await self.stop()
        else:
            await self._stop(_FLUSH_S)

    async def stop(self) -> None:
        """Ends the service now and cancels what is running; does nothing after `drain`."""
        await self._stop(None)
        await self._boundary.idle()

    async def _stop(self, grace_s: float | None) -> None:
        if self._watching is not None:
            self._watching.cancel()
        self._service.memories.close()
        await self._server.stop(grace_s)
        with suppress(TimeoutError):
            await asyncio.wait_for(in_thread(self._service.tracing.close), _SPANS_S)
        if self._probed is not None:
            await self._probed.stop(None)


def _reflect(server: grpc.aio.Server, services: Sequence[str]) -> None:
    """Callers may ask the server what its services are."""
    from grpc_reflection.v1alpha import reflection  # noqa: PLC0415  # an embedded client, which serves nobody, lives without it

    told = [*services, reflection.SERVICE_NAME]
    reflection.enable_server_reflection(told, server, described(*told))


async def _listen(
    server: grpc.aio.Server, host: str, port: int, credentials: grpc.ServerCredentials | None, host_key: str, port_key: str
) -> int:
    address = join(host, port)
    try:
        port = server.add_insecure_port(address) if credentials is None else server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise ConfigError(f"{host_key}, {port_key}: cannot listen on {address}: {error}") from None
    await server.start()
    return port


def _max_connections() -> int:
    """Half of the files that this process may open; the rest is not for callers."""
    return min(_MAX_CONNECTIONS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)


def _options(config: ServerConfig, keepalive_ms: int) -> Options:
    return [
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.max_send_message_length", config.max_message_bytes),
        # Bounds on what callers keep open: further calls of a connection wait at the client, further connections are closed.
        ("grpc.max_concurrent_streams", _MAX_CALLS_OF_A_CONNECTION),
        # What is not read stays where it comes from, but for 64 KiB of a call; gRPC would take megabytes of each on a fast network.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.max_allowed_incoming_connections", _max_connections()),
        ("grpc.max_connection_idle_ms", _IDLE_CONNECTION_MS),
        ("grpc.server_handshake_timeout_ms", _HANDSHAKE_MS),
        # Two services on one port would share its connections at random; the second one must fail instead.
        ("grpc.so_reuseport", int(config.processes > 1)),
        # Notices a client whose machine vanished, and lets clients do the same to us.
        ("grpc.keepalive_time_ms", keepalive_ms),
        ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
        ("grpc.http2.ping_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
        ("grpc.http2.max_pings_without_data", 0),  # also on a stream on which nothing happens for days
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", _LEAST_PING_INTERVAL_MS),
    ]


def _options_of_health(config: ServerConfig) -> Options:
    """What comes there is not counted, so it has to be small."""
    small = config.model_copy(update={"max_message_bytes": min(config.max_message_bytes, MAX_REQUEST_BYTES)})
    return _options(small, _KEEPALIVE_MS)


def _ages(config: ServerConfig) -> Options:
    """A client that must reconnect looks up the service's name again, and so finds new frontends."""
    if not config.max_connection_age_s:
        return []
    ages = [("grpc.max_connection_age_ms", max(1, round(config.max_connection_age_s * 1000)))]
    if config.max_connection_age_grace_s is not None:
        ages.append(("grpc.max_connection_age_grace_ms", round(config.max_connection_age_grace_s * 1000)))
    return ages
