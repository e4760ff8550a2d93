"""Who may reach the service and call it: exposure, TLS, the bearer token."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grpc

from moeserve.addresses import is_loopback
from moeserve.config import ControllerConfig, ServerConfig, ServiceConfig
from moeserve.errors import ConfigError

#: the placement of the largest models takes some hundred KB
_MAX_CONTROL_BYTES: Final = 64 * 2**20


def check_exposure(config: ServerConfig) -> None:
    """Raises ConfigError when other machines could reach a service that does not encrypt or does not ask who calls.

    Callers are known by their token or, with client_ca, by their certificate.
    """
    knows_callers = config.auth_token_file is not None or config.client_ca is not None
    if config.insecure or is_loopback(config.host) or (config.tls_cert is not None and knows_callers):
        return
    raise ConfigError(
        f"server.host {config.host} can be reached from other machines: set server.tls_cert, server.tls_key and "
        "server.auth_token_file, or server.insecure = true to serve anyone in the clear"
    )


def controller_address(config: ServiceConfig) -> ServerConfig:
    """Where the controller of a deployed service listens: [server] with the address of [controller].

    Raises ConfigError when other machines could reach it unencrypted. Whoever calls it needs a token in any case.
    """
    host, server = config.controller.control_host, config.server
    if not (server.insecure or is_loopback(host) or server.tls_cert is not None):
        raise ConfigError(
            f"controller.control_host {host} can be reached from other machines: set server.tls_cert and server.tls_key, or "
            "server.insecure = true to send tokens and keys in the clear"
        )
    own = {"host": host, "port": config.controller.control_port, "health_port": None, "auth_token_file": None}
    return server.model_copy(update={**own, "max_message_bytes": _MAX_CONTROL_BYTES})


def frontend_tokens(config: ControllerConfig, *own: str) -> frozenset[bytes]:
    """Those with which frontends may follow: that of the configuration, if there is one, and `own`.

    Raises ConfigError naming the file that cannot be used.
    """
    told = _read_token(config.frontend_token_file, "controller.frontend_token_file")
    return frozenset(token for token in (told, *(token.encode() for token in own)) if token)


@dataclass(frozen=True)
class Tokens:
    """Bearer tokens: of callers, None = they need none; of the administrator, None = there is none; of frontends that follow."""

    caller: bytes | None = None
    admin: bytes | None = None
    frontends: frozenset[bytes] = frozenset()


def read_tokens(config: ServerConfig, frontends: frozenset[bytes] = frozenset()) -> Tokens:
    """Raises ConfigError naming the file that cannot be used, or that holds the token of somebody who may do less."""
    tokens = Tokens(
        _read_token(config.auth_token_file, "server.auth_token_file"),
        _read_token(config.admin_token_file, "server.admin_token_file"),
        frontends,
    )
    for token, key in ((tokens.caller, "server.auth_token_file"), (tokens.admin, "server.admin_token_file")):
        if token is not None and token in frontends:
            raise ConfigError(f"controller.frontend_token_file and {key} hold the same token; each needs one of its own")
    if tokens.admin is not None and tokens.admin == tokens.caller:
        raise ConfigError("server.admin_token_file and server.auth_token_file hold the same token: callers could change what is served")
    return tokens


def _read_token(path: Path | None, key: str) -> bytes | None:
    if path is None:
        return None
    token = _read(path, key).decode("utf-8", errors="replace").strip()
    if not token or not token.isascii() or not token.isprintable():
        raise ConfigError(f"{key} {path} must hold one line of printable ASCII, the token")
    return token.encode()


def server_credentials(config: ServerConfig) -> grpc.ServerCredentials | None:
    """TLS, mutual with client_ca; None without tls_cert. Raises ConfigError naming the file that cannot be used."""
    if config.tls_cert is None or config.tls_key is None:
        return None
    cert, key = _read(config.tls_cert, "server.tls_cert"), _read(config.tls_key, "server.tls_key")
    ca = None if config.client_ca is None else _read(config.client_ca, "server.client_ca")
    # gRPC would accept any bytes here and then fail to listen without saying why.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(config.tls_cert, config.tls_key)
    except ssl.SSLError as error:
        raise ConfigError(f"server.tls_cert {config.tls_cert} and server.tls_key {config.tls_key} do not make a pair: {error}") from None
    try:
        context.load_verify_locations(config.client_ca) if config.client_ca else None
    except ssl.SSLError as error:
        raise ConfigError(f"server.client_ca {config.client_ca} is not a PEM certificate: {error}") from None
    return grpc.ssl_server_credentials([(key, cert)], ca, require_client_auth=ca is not None)


def _read(path: Path, key: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{key} {path} cannot be read: {error.strerror}") from None
