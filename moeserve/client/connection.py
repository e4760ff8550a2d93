"""How a client reaches a service: address, TLS, token, limits, retries."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc

from moeserve.addresses import parse_target
from moeserve.client.arguments import parse_seconds, parse_token
from moeserve.errors import ConfigError
from moeserve.files import read_file
from moeserve.files.pem import check_authority, check_pair
from moeserve.v1 import moe_service_pb2 as pb

SERVICE_NAME: Final = pb.DESCRIPTOR.services_by_name["MoEService"].full_name

#: bound on one message in either direction; the service has its own, which may be lower
_MAX_MESSAGE_BYTES: Final = 2**30
#: of a file of TLS
_MAX_FILE_BYTES: Final = 2**24

# A name may have several frontends: requests are spread over them. What is asked here can be asked twice without harm; `Forward` is made
# again by the clients themselves, which know what UNAVAILABLE is about.
_SERVICE_CONFIG: Final = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "methodConfig": [
        {
            "name": [{"service": SERVICE_NAME, "method": method} for method in ("ForwardStream", "ListLayers", "GetStats")],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.05s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
}

Options = Sequence[tuple[str, int | str]]

#: a service that comes back is found within seconds, after any outage
_RECONNECTING: Final[Options] = (
    ("grpc.initial_reconnect_backoff_ms", 250),
    ("grpc.max_reconnect_backoff_ms", 3_000),
    # How long one attempt may take, despite its name: a lost packet is sent again less and less often.
    ("grpc.min_reconnect_backoff_ms", 5_000),
    # How soon a name may be looked up again, which happens when a connection ends.
    ("grpc.dns_min_time_between_resolutions_ms", 2_000),
)

CALLING: Final[Options] = (
    *_RECONNECTING,
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
    # Each client has a connection of its own: where several frontends share a port, they share the clients.
    ("grpc.use_local_subchannel_pool", 1),
    # Notices a service whose machine vanished while a call waits for it.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
)
#: between processes of one service, and for its administrators
NO_PROXY: Final[Options] = (("grpc.enable_http_proxy", 0),)
ADMINISTERING: Final[Options] = (*CALLING, *NO_PROXY)

#: the placement of the largest models takes some hundred KB
_MAX_ORDER_BYTES: Final = 64 * 2**20
FOLLOWING: Final[Options] = (
    *_RECONNECTING,
    *NO_PROXY,
    ("grpc.max_receive_message_length", _MAX_ORDER_BYTES),
    # Notices a controller whose machine vanished, even after days without a message.
    ("grpc.keepalive_time_ms", 15_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    # Attempts are independent: none waits because of earlier ones.
    ("grpc.use_local_subchannel_pool", 1),
)


@dataclass(frozen=True)
class TLS:
    """PEM files. `ca` verifies the service, None = the system's authorities; `cert` and `key` are this client's, for mutual TLS."""

    ca: Path | str | None = None
    cert: Path | str | None = None
    key: Path | str | None = None


class Reach:
    """The target, TLS and token of a client, with channel options for its use.

    Raises ConfigError naming the invalid argument, or the file that cannot be read.
    """

    def __init__(self, target: Any, token: Any, tls: TLS | bool | None, timeout: Any, options: Options) -> None:
        if not isinstance(tls, TLS | bool | None):
            raise ConfigError(f"tls is {tls!r}; allowed: None, True, or a TLS with the files to use")
        parsed = parse_target(target)
        self.target, self.timeout_s = parsed.text, parse_seconds(timeout, "timeout")
        #: metadata of every call
        self.metadata = _metadata(parse_token(token))
        self._tls = tls
        # gRPC would use a proxy of the environment for any target but a socket file.
        self._options = (*options, *NO_PROXY) if parsed.is_here else options
        self.read_files()

    def open(self) -> grpc.Channel:
        """A channel for blocking calls. The files are read again."""
        credentials = self.read_files()
        if credentials is None:
            return grpc.insecure_channel(self.target, options=self._options)
        return grpc.secure_channel(self.target, credentials, options=self._options)

    def open_async(self) -> grpc.aio.Channel:
        """A channel for the running event loop. The files are read again."""
        credentials = self.read_files()
        if credentials is None:
            return grpc.aio.insecure_channel(self.target, options=self._options)
        return grpc.aio.secure_channel(self.target, credentials, options=self._options)

    def read_files(self) -> grpc.ChannelCredentials | None:
        """None = no TLS."""
        if self._tls is None or self._tls is False:
            return None
        files = TLS() if self._tls is True else self._tls
        if (files.cert is None) != (files.key is None):
            raise ConfigError("TLS cert and key must be given together")
        read = [None if path is None else _read(Path(path)) for path in (files.ca, files.key, files.cert)]
        _check(files)
        return grpc.ssl_channel_credentials(*read)


def _metadata(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),) if token else ()


def _read(path: Path) -> bytes:
    try:
        return read_file(path, _MAX_FILE_BYTES)
    except OSError as error:
        raise ConfigError(f"TLS file {path} cannot be read: {error.strerror}") from None


def _check(files: TLS) -> None:
    try:
        check_authority(Path(files.ca)) if files.ca is not None else None
    except OSError as error:
        raise ConfigError(f"TLS ca {files.ca} is not a PEM certificate: {error}") from None
    try:
        check_pair(Path(files.cert), Path(files.key)) if files.cert is not None and files.key is not None else None
    except OSError as error:
        raise ConfigError(f"TLS cert {files.cert} and key {files.key} are not a pair: {error}") from None
