"""Bytes -> protobuf messages. Inside gRPC, a message that cannot be parsed would cause UNKNOWN and a traceback."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any, Final

from google.protobuf.message import DecodeError

from moeserve.errors import InvalidRequest
from moeserve.log_limit import limited_logger
from moeserve.server.rpc import Context

#: of requests without tensors: names, and at most a number for every expert of a layer
MAX_REQUEST_BYTES: Final = 2**20

_strangers: Final = limited_logger(__name__)


class Parser:
    """Parses the requests of one method; `deserializer` = None leaves bytes as they are."""

    def __init__(self, method: str, deserializer: Callable[[bytes], Any] | None) -> None:
        self._method = method
        self._deserializer = deserializer

    def one(self, message: bytes, context: Context) -> Any:
        """The caller's message. Raises InvalidRequest."""
        if self._deserializer is None:
            return message
        try:
            if len(message) > MAX_REQUEST_BYTES:
                raise InvalidRequest(f"a request of {len(message)} bytes to {self._method}; allowed: at most {MAX_REQUEST_BYTES}")
            return self._deserializer(message)
        except (DecodeError, ValueError):
            sentence = f"{len(message)} bytes are not a protobuf request of {self._method}"
            _strangers.warning("%s: %s", context.peer(), sentence)
            raise InvalidRequest(sentence) from None

    async def each(self, messages: AsyncIterator[bytes], context: Context) -> AsyncIterator[Any]:
        """The messages of a stream. Raises InvalidRequest."""
        async for message in messages:
            yield self.one(message, context)
