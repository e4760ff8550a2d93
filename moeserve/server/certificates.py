"""TLS of the server, mutual with server.client_ca. Each new connection uses the current files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc

from moeserve.config import ServerConfig
from moeserve.errors import ConfigError
from moeserve.files import Rotating, read_file, read_secret
from moeserve.files.pem import check_authority, check_pair

_MAX_BYTES: Final = 2**20


def server_credentials(config: ServerConfig) -> grpc.ServerCredentials | None:
    """None without tls_cert. Raises ConfigError naming the file that cannot be used."""
    if config.tls_cert is None or config.tls_key is None:
        return None
    files = _Files(config.tls_cert, config.tls_key, config.client_ca)
    rotating = Rotating((files.cert, files.key, files.ca), files.load)
    first = rotating.current()
    # The stubs do not know that it may return None.
    fetch: Any = _Fetch(rotating, first)
    return grpc.dynamic_ssl_server_credentials(first, fetch, require_client_authentication=config.client_ca is not None)


class _Fetch:
    """gRPC calls it before every handshake, in a thread of its own: the files to use from now on, None = no change."""

    def __init__(self, rotating: Rotating[grpc.ServerCertificateConfiguration], used: grpc.ServerCertificateConfiguration) -> None:
        self._rotating, self._used = rotating, used

    def __call__(self) -> grpc.ServerCertificateConfiguration | None:
        found = self._rotating.current()
        if found is self._used:
            return None
        self._used = found
        return found


@dataclass(frozen=True)
class _Files:
    cert: Path
    key: Path
    ca: Path | None

    def load(self) -> grpc.ServerCertificateConfiguration:
        """Raises ConfigError naming the file that cannot be used."""
        cert, key, ca = self._read()
        self._check()
        if self._read() != (cert, key, ca):
            raise ConfigError(f"server.tls_cert {self.cert}, its key or server.client_ca changed while they were read")
        return grpc.ssl_server_certificate_configuration([(key, cert)], ca)

    def _read(self) -> tuple[bytes, bytes, bytes | None]:
        cert, key = _content("server.tls_cert", self.cert), _content("server.tls_key", self.key, is_secret=True)
        return cert, key, None if self.ca is None else _content("server.client_ca", self.ca)

    def _check(self) -> None:
        try:
            check_pair(self.cert, self.key)
        except OSError as error:
            raise ConfigError(f"server.tls_cert {self.cert} and server.tls_key {self.key} are not a pair: {error}") from None
        try:
            check_authority(self.ca) if self.ca else None
        except OSError as error:
            raise ConfigError(f"server.client_ca {self.ca} is not a PEM certificate: {error}") from None


def _content(name: str, path: Path, is_secret: bool = False) -> bytes:
    try:
        return read_secret(path) if is_secret else read_file(path, _MAX_BYTES)
    except OSError as error:
        raise ConfigError(f"{name} {path} cannot be read: {error.strerror}") from None
