"""Small requests, and their answers, that share one message: `ForwardManyRequest`, `ForwardManyResponse`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from google.protobuf.message import DecodeError

from moeserve.errors import InvalidRequest
from moeserve.v1 import moe_service_pb2 as pb

#: what one message may bring: parts are copied out of it, which only pays for small ones
MAX_REQUESTS: Final = 256
MAX_BYTES: Final = 4 * 2**20


def join(parts: Sequence[bytes]) -> bytes:
    """The message of these requests, or of these answers."""
    return pb.ForwardParts(parts=parts).SerializeToString()


def split(message: bytes) -> Sequence[bytes]:
    """The parts of a message, not read yet. Raises InvalidRequest."""
    try:
        return pb.ForwardParts.FromString(message).parts
    except DecodeError as error:
        raise InvalidRequest(f"not a message of several requests or answers: {error}") from None


def split_requests(message: bytes) -> Sequence[bytes]:
    """The requests in a message of a caller. Raises InvalidRequest for more of them than may come together."""
    if len(message) > MAX_BYTES:
        raise InvalidRequest(f"the message has {len(message)} bytes; allowed: {MAX_BYTES} for requests that come together")
    parts = split(message)
    if len(parts) > MAX_REQUESTS:
        raise InvalidRequest(f"{len(parts)} requests came together; allowed: {MAX_REQUESTS}")
    return parts
