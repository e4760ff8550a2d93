"""How a client reaches a service: TLS, token, limits, retries."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grpc

from moeserve.errors import ConfigError
from moeserve.v1 import moe_service_pb2 as pb

SERVICE_NAME: Final = pb.DESCRIPTOR.services_by_name["MoEService"].full_name

#: bound on one message either way; the service has its own, which may be lower
_MAX_MESSAGE_BYTES: Final = 2**30
#: larger requests are not sent again when the service turns out to be unavailable
_RETRY_BUFFER_BYTES: Final = 64 * 2**20

# A name may stand for several frontends: requests are shared out among them. A forward can be run twice without harm, and UNAVAILABLE says
# that it may not have been run at all.
_SERVICE_CONFIG: Final = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "methodConfig": [
        {
            "name": [{"service": SERVICE_NAME}],
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

CHANNEL_OPTIONS: Final[tuple[tuple[str, int | str], ...]] = (
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.per_rpc_retry_buffer_size", _RETRY_BUFFER_BYTES),
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
    # Notices a service whose machine vanished while a call waits for it.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
)


@dataclass(frozen=True)
class TLS:
    """PEM files. `ca` vouches for the service, None = the system's authorities; `cert` and `key` are this client's, for mutual TLS."""

    ca: Path | str | None = None
    cert: Path | str | None = None
    key: Path | str | None = None


def channel_credentials(tls: TLS | bool | None) -> grpc.ChannelCredentials | None:
    """None = no TLS. Raises ConfigError naming a file that cannot be read."""
    if tls is None or tls is False:
        return None
    files = TLS() if tls is True else tls
    if (files.cert is None) != (files.key is None):
        raise ConfigError("TLS cert and key must be given together")
    return grpc.ssl_channel_credentials(*(None if path is None else _read(Path(path)) for path in (files.ca, files.key, files.cert)))


def open_channel(target: str, tls: TLS | bool | None) -> grpc.Channel:
    """A channel for blocking calls. Raises ConfigError naming a file that cannot be read."""
    credentials = channel_credentials(tls)
    if credentials is None:
        return grpc.insecure_channel(target, options=CHANNEL_OPTIONS)
    return grpc.secure_channel(target, credentials, options=CHANNEL_OPTIONS)


def call_metadata(token: str | None) -> tuple[tuple[str, str], ...]:
    """What every call carries."""
    return () if token is None else (("authorization", f"Bearer {token}"),)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"TLS file {path} cannot be read: {error.strerror}") from None
