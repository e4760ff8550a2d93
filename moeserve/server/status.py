"""Errors -> gRPC statuses with the details of the `google.rpc` error model."""

from __future__ import annotations

from typing import Final

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2 as details
from google.rpc import status_pb2
from grpc_status import rpc_status

from moeserve.errors import InvalidRequest, MoEServeError, Overloaded
from moeserve.log_limit import limited_logger

_DOMAIN: Final = "moeserve"
# The sentence travels up to three times in the trailing metadata, once with three characters for a byte. Peers limit it to 8 KiB.
_MAX_MESSAGE_BYTES: Final = 1000

_strangers: Final = limited_logger(__name__)


def as_user_error(error: BaseException, method: str) -> MoEServeError:
    """`error` if a user can act on it; any other error is a bug of ours: logged with its traceback, and answered without details."""
    if isinstance(error, MoEServeError):
        return error
    _strangers.error("%s failed", method, exc_info=error, extra={"kind": f"{method} {type(error).__name__}"})
    return MoEServeError("internal error; the server's log says more")


def to_status(error: MoEServeError) -> grpc.Status:
    """`error` as a status for any gRPC client: code, sentence, and what to fix or when to try again."""
    status = status_pb2.Status(code=error.code.value[0], message=_cut(str(error)))
    for detail in _details(error):
        status.details.add().Pack(detail)
    answer: grpc.Status = rpc_status.to_status(status)
    return answer


def _details(error: MoEServeError) -> list[Message]:
    found: list[Message] = [details.ErrorInfo(reason=type(error).__name__, domain=_DOMAIN)]
    if isinstance(error, InvalidRequest) and error.violations:
        violations = [
            details.BadRequest.FieldViolation(field=violation.field, description=_cut(violation.description))
            for violation in error.violations
        ]
        found.append(details.BadRequest(field_violations=violations))
    if isinstance(error, Overloaded):
        violation = details.QuotaFailure.Violation(subject="queued tokens", description=_cut(str(error)))
        found.append(details.QuotaFailure(violations=[violation]))
    if error.retry_after_s is not None:
        delay = Duration()
        delay.FromMilliseconds(max(1, round(1000 * error.retry_after_s)))
        found.append(details.RetryInfo(retry_delay=delay))
    return found


def _cut(sentence: str) -> str:
    """As much as a status has room for. What a file or its name says need not be text."""
    data = sentence.encode("utf-8", "backslashreplace")
    more = "" if len(data) <= _MAX_MESSAGE_BYTES else "…"
    return data[:_MAX_MESSAGE_BYTES].decode("utf-8", "ignore") + more
