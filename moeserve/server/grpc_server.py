"""The gRPC server: what is registered on it, where it listens, how it starts and ends."""

from __future__ import annotations

import asyncio
import errno
import socket
from typing import Final

import grpc
from grpc_health.v1 import health
from grpc_reflection.v1alpha import reflection

from moeserve.config import ServerConfig
from moeserve.errors import ConfigError
from moeserve.server.admin import ADMIN_SERVICE_NAME, Admin, AdminService
from moeserve.server.boundary import Boundary, Observe
from moeserve.server.engine import Engine
from moeserve.server.health import Health
from moeserve.server.security import check_exposure, read_tokens, server_credentials
from moeserve.server.service import SERVICE_NAME, MoEService

#: after the last call has ended: for its answer to leave, and before watchers of the health service are cut off
_FLUSH_S: Final = 1.0


class GrpcServer:
    """Serves `engine` as `config` says; `admin` too, to whoever has the admin token, if there is one.

    Health is NOT_SERVING until `set_serving` was called for every layer.

    `observe` is called for every call with method, status code and seconds. Raises ConfigError for a configuration that is
    refused: exposed without protection, unreadable files. To be made and used inside one event loop.
    """

    def __init__(self, engine: Engine, config: ServerConfig, observe: Observe, admin: Admin | None = None) -> None:
        check_exposure(config)
        tokens = read_tokens(config)
        self._config = config
        self._layers = [spec.name for spec in engine.layers]
        self._health = Health(self._layers)
        self._credentials = server_credentials(config)
        self._boundary = Boundary(tokens, observe)
        self._server = grpc.aio.server(interceptors=[self._boundary], options=_options(config))
        self._probed = None if config.health_port is None else grpc.aio.server(options=_options(config))
        #: where health alone is told in plain text; None = nowhere
        self.health_port = config.health_port
        service = MoEService(engine, config.max_tokens_per_request, observe, self._boundary.draining)
        self._server.add_generic_rpc_handlers((service.handlers(),))
        names = [SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME]
        if admin is not None and tokens.admin is not None:
            self._server.add_generic_rpc_handlers((AdminService(admin).handlers(),))
            names.append(ADMIN_SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)

    async def start(self) -> int:
        """Listens; returns the port. Raises ConfigError when the address cannot be had."""
        await self._health.add_to(self._server)
        port = await _listen(self._server, self._config.host, self._config.port, self._credentials, "server.port")
        if self._probed is not None:
            assert self.health_port is not None
            await self._health.add_to(self._probed)
            self.health_port = await _listen(self._probed, self._config.host, self.health_port, None, "server.health_port")
        return port

    def set_serving(self, layer: int, serving: bool) -> None:
        """What the health service says of a layer; the service as a whole is SERVING while every layer is."""
        self._health.set_serving(self._layers[layer], serving)

    async def drain(self, timeout_s: float) -> None:
        """Ends the service: NOT_SERVING, new calls refused with UNAVAILABLE, running ones may finish; then it stops.

        Calls still running after `timeout_s` are cancelled.
        """
        await self._health.drain()
        self._boundary.draining.set()
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
        await self._server.stop(grace_s)
        if self._probed is not None:
            await self._probed.stop(None)


async def _listen(server: grpc.aio.Server, host: str, port: int, credentials: grpc.ServerCredentials | None, key: str) -> int:
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        await _require_free(host, port)
        port = server.add_insecure_port(address) if credentials is None else server.add_secure_port(address, credentials)
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"server.host, {key}: cannot listen on {address}: {reason}") from None
    await server.start()
    return port


async def _require_free(host: str, port: int) -> None:
    """gRPC is content with one of the addresses of a name, and does not tell why it got none."""
    for family, _, _, _, address in await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM):
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(address)
            except OSError as error:
                # A name may stand for an address of a protocol that this machine does not speak.
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise


def _options(config: ServerConfig) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.max_send_message_length", config.max_message_bytes),
        # Two servers on one port would share its connections at random; the second one must fail instead.
        ("grpc.so_reuseport", 0),
        # Notices a client whose machine vanished, and lets clients do the same to us.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ]
