"""gRPC failures -> the error the server raised, or one sentence on why there was no answer."""

from __future__ import annotations

import errno
import os
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2 as details
from google.rpc import status_pb2
from grpc_status import rpc_status

from moeserve.errors import Cancelled, DeadlineExceeded, FieldViolation, InvalidRequest, MoEServeError, ServiceUnreachable, from_status

_SERVER_DOMAIN: Final = "moeserve"
_NOT_HERE: Final = "in a deployed service, send requests to a frontend, and status and changes to the controller"
#: gRPC's message about a server that answers in HTTP/1
_OTHER_PROTOCOLS: Final = ("http1.x server", "Failed parsing HTTP/2")
#: what gRPC says where nobody listens, or whoever did has hung up
_GONE: Final = ("Connection refused", "Connection reset", "Socket closed", "connection closed", "Broken pipe", "GOAWAY", "recvmsg")
#: where nobody answers, as on a machine that is busy with starting a service, or is away itself
_SILENT: Final = ("timed out", "Timeout occurred", "No route to host", "is unreachable")
#: what the system says then, in the language of the program
_ERRNOS: Final = (errno.ECONNREFUSED, errno.ECONNRESET, errno.EPIPE, errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH)
#: what gRPC says of calls that this program has cancelled; a service cancels calls when it ends before they do
_OURS: Final = ("Locally cancelled", "Channel closed", "Channel is closed")


def to_error(failure: grpc.RpcError, target: str, timeout_s: float | None) -> MoEServeError:
    """The MoEServeError to raise for `failure` of a call to `target`."""
    call: Any = failure  # every RpcError of a call is that call; the types do not say it
    code, sentence = call.code(), call.details() or "no reason was given"
    status = _status_of(call)
    if status is not None and _is_ours(status):
        return _rebuilt(code, status)
    if code is grpc.StatusCode.UNAVAILABLE:
        is_other = any(sign in sentence for sign in _OTHER_PROTOCOLS)
        hint = "the server there does not speak gRPC (is it a metrics port?): " if is_other else ""
        return ServiceUnreachable(f"{target} is unavailable: {hint}{sentence}", may_return=_is_gone(sentence))
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded.of(target, timeout_s)
    if code is grpc.StatusCode.CANCELLED:
        is_ours = any(sign in sentence for sign in _OURS)
        ended = ServiceUnreachable(f"{target} has ended the call: {sentence}", may_return=True)
        return Cancelled(f"the call to {target} was cancelled") if is_ours else ended
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in sentence:
        return InvalidRequest(f"the message is too large: {sentence}")
    return from_status(
        code, f"{target} does not offer this method ({sentence}): {_NOT_HERE}" if code is grpc.StatusCode.UNIMPLEMENTED else sentence
    )


def _status_of(call: Any) -> status_pb2.Status | None:
    """What the server says beside code and sentence; None = nothing, or something that belongs to another failure, as gRPC's own."""
    try:
        return rpc_status.from_call(call)
    except (ValueError, DecodeError):
        return None


def _is_gone(sentence: str) -> bool:
    """Whether nobody listens any more, whoever did has hung up, or nobody answers."""
    return any(sign in sentence for sign in (*_GONE, *_SILENT, *map(os.strerror, _ERRNOS)))


def _is_ours(status: status_pb2.Status) -> bool:
    info = details.ErrorInfo()
    return any(detail.Unpack(info) and info.domain == _SERVER_DOMAIN for detail in status.details)


def _rebuilt(code: grpc.StatusCode, status: status_pb2.Status) -> MoEServeError:
    error = from_status(code, status.message)
    retry, bad_request = details.RetryInfo(), details.BadRequest()
    is_retried = any(detail.Unpack(retry) for detail in status.details)
    error.retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9 if is_retried else None
    if isinstance(error, InvalidRequest) and any(detail.Unpack(bad_request) for detail in status.details):
        error.violations = tuple(FieldViolation(found.field, found.description) for found in bad_request.field_violations)
    return error
