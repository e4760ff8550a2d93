"""Access to the service: exposure, and bearer tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from moeserve.addresses import is_loopback
from moeserve.config import ControllerConfig, ServerConfig
from moeserve.errors import ConfigError
from moeserve.files import Rotating, read_secret

#: the placement of the largest models takes some hundred KB
_MAX_CONTROL_BYTES: Final = 64 * 2**20


def check_exposure(config: ServerConfig) -> None:
    """Raises ConfigError when other machines could reach a service without encryption or authentication.

    Callers authenticate by token or, with client_ca, by certificate.
    """
    knows_callers = config.auth_token_file is not None or config.client_ca is not None
    if config.insecure or is_loopback(config.host) or (config.tls_cert is not None and knows_callers):
        return
    raise ConfigError(
        f"server.host {config.host} can be reached from other machines: set server.tls_cert, server.tls_key and "
        "server.auth_token_file, or server.insecure = true to serve without encryption and authentication"
    )


def controller_address(server: ServerConfig, controller: ControllerConfig) -> ServerConfig:
    """Where the controller of a deployed service listens: [server] with the address of [controller].

    Raises ConfigError when other machines could reach it unencrypted. Callers need a token in any case.
    """
    host = controller.control_host
    if not (server.insecure or is_loopback(host) or server.tls_cert is not None):
        raise ConfigError(
            f"controller.control_host {host} can be reached from other machines: set server.tls_cert and server.tls_key, or "
            "server.insecure = true to send tokens and keys unencrypted"
        )
    own = {"host": host, "port": controller.control_port, "health_port": None, "auth_token_file": None}
    return server.model_copy(update={**own, "max_message_bytes": _MAX_CONTROL_BYTES})


@dataclass(frozen=True)
class FrontendTokens:
    """The tokens of frontends: the one in `file`, if there is one, and `own`. False = there are none.

    is_private: `own` are given only to programs that need not be told of them.
    """

    file: Path | None = None
    own: frozenset[bytes] = frozenset()
    is_private: bool = False

    def __bool__(self) -> bool:
        return self.file is not None or bool(self.own)

    def read(self) -> frozenset[bytes]:
        """Raises ConfigError when the file cannot be used."""
        told = _read_token(self.file, "controller.frontend_token_file")
        return self.own if told is None else self.own | {told}


def frontend_tokens(config: ControllerConfig, *own: str) -> FrontendTokens:
    """The token of the configuration, if there is one, and `own`. Raises ConfigError naming the file that cannot be used."""
    tokens = FrontendTokens(config.frontend_token_file, frozenset(token.encode() for token in own))
    tokens.read()
    return tokens


@dataclass(frozen=True)
class Tokens:
    """Bearer tokens of callers (None = not needed), of the administrator (None = no administrator) and of frontends.

    lets_any_follow: a frontend token was given out; else those of `frontends` are known to this service's own programs only.
    """

    caller: bytes | None = None
    admin: bytes | None = None
    frontends: frozenset[bytes] = frozenset()
    lets_any_follow: bool = True


def rotating_tokens(config: ServerConfig, frontends: FrontendTokens) -> Rotating[Tokens]:
    """As `read_tokens`, and again whenever one of the files is replaced."""

    def read() -> Tokens:
        return replace(read_tokens(config, frontends.read()), lets_any_follow=not frontends.is_private)

    return Rotating((config.auth_token_file, config.admin_token_file, frontends.file), read)


def read_tokens(config: ServerConfig, frontends: frozenset[bytes] = frozenset()) -> Tokens:
    """Raises ConfigError naming the file that cannot be used, or that holds the same token as another with fewer rights."""
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
    try:
        token = read_secret(path).decode("utf-8", errors="replace").strip()
    except OSError as error:
        raise ConfigError(f"{key} {path} cannot be read: {error.strerror}") from None
    if not token or not token.isascii() or not token.isprintable():
        raise ConfigError(f"{key} {path} must hold one line of printable ASCII, the token")
    return token.encode()
