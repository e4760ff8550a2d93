"""What can go wrong for a user, and how sentences say numbers.

Each class owns its gRPC status, and client and server raise the same class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import grpc


#: modules that `pip install moeserve` leaves out -> the extra that brings them
_EXTRAS: Final = {
    **dict.fromkeys(("grpc_reflection", "prometheus_client", "pydantic", "pydantic_core", "ray", "rich"), "serve"),
    **dict.fromkeys(("safetensors", "tomli_w", "typer", "yaml", "zmq"), "serve"),
    **dict.fromkeys(("tokenizers", "transformers"), "hf"),
}


def number_of(number: int, noun: str) -> str:
    """How sentences for users say a number of things: 1 host, 2 hosts."""
    if number == 1:
        return f"1 {noun}"
    if noun.endswith("y"):
        return f"{number} {noun[:-1]}ies"
    return f"{number} {noun}es" if noun.endswith("s") else f"{number} {noun}s"


class _Status:
    """A gRPC status code by its name. Imports gRPC on first use: the command line must answer at once."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, error: object, kind: type | None = None) -> grpc.StatusCode:
        import grpc  # noqa: PLC0415

        return grpc.StatusCode[self.name]


@dataclass(frozen=True)
class FieldViolation:
    """One field of a request that is wrong: dotted path and one sentence."""

    field: str
    description: str


class MoEServeError(Exception):
    """Base of every error a user can meet; the message is one clear sentence."""

    code = _Status("INTERNAL")
    #: after how long to try again; None = trying again does not help, or nobody can say
    retry_after_s: float | None = None

    def __init__(self, message: str = "") -> None:
        # What a file or its name says need not be text. Nothing that is sent can hold it, so it is spelled out here.
        super().__init__(message.encode("utf-8", "backslashreplace").decode())


class ConfigError(MoEServeError):
    """The configuration or a checkpoint cannot be used; commands exit with 2."""

    code = _Status("FAILED_PRECONDITION")


class CheckpointError(ConfigError):
    """A checkpoint file is missing, truncated, corrupted or of an unknown kind."""


class CheckpointChanged(CheckpointError):
    """Files have changed since the served weights were read from them."""


class InvalidRequest(MoEServeError):
    """The request itself is wrong: shape, dtype, size or values."""

    code = _Status("INVALID_ARGUMENT")

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message)
        self.violations: Sequence[FieldViolation] = (FieldViolation(field, str(self)),) if field else ()


class UnknownLayer(MoEServeError):
    """No such layer (or model) is served."""

    code = _Status("NOT_FOUND")


class Overloaded(MoEServeError):
    """The service has more to do than it can do in time; try again after `retry_after_s`, None = it will not fit then either."""

    code = _Status("RESOURCE_EXHAUSTED")

    def __init__(self, message: str, retry_after_s: float | None = 0.1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ExpertUnavailable(MoEServeError):
    """Experts this request needs have no live host, or the service is starting or draining."""

    code = _Status("UNAVAILABLE")

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ServiceUnreachable(ExpertUnavailable):
    """No service answers at the target: raised by clients only; commands exit with 3.

    `may_return`: it may be one that is started again; false for what is there and is no service.
    """

    def __init__(self, message: str, may_return: bool = True) -> None:
        super().__init__(message)
        self.may_return = may_return


class DeadlineExceeded(MoEServeError):
    """The deadline passed before the answer was ready."""

    code = _Status("DEADLINE_EXCEEDED")
    #: what a client has had no answer from; "" = it is the service that says so
    target = ""

    @classmethod
    def of(cls, target: str, timeout_s: float | None) -> DeadlineExceeded:
        """A client has had no answer within `timeout_s`, None = within a deadline that somebody else has set."""
        error = cls(f"no answer from {target} within {'its deadline' if timeout_s is None else f'{timeout_s:g} s'}")
        error.target = target
        return error


class Cancelled(MoEServeError):
    """The caller cancelled the request."""

    code = _Status("CANCELLED")


class NonFiniteOutput(MoEServeError):
    """The experts answered a request with NaN or Inf, or with numbers that do not fit its dtype; larger dtypes may help."""

    code = _Status("DATA_LOSS")


class Unauthenticated(MoEServeError):
    """The bearer token is missing or wrong."""

    code = _Status("UNAUTHENTICATED")


class PermissionDenied(MoEServeError):
    """The caller is known but may not do this."""

    code = _Status("PERMISSION_DENIED")


class NotOffered(MoEServeError):
    """The process at the target does not offer this method: it has another role, or is older."""

    code = _Status("UNIMPLEMENTED")


_BY_NAME = {
    vars(cls)["code"].name: cls
    for cls in (
        ConfigError,
        InvalidRequest,
        UnknownLayer,
        Overloaded,
        ExpertUnavailable,
        DeadlineExceeded,
        Cancelled,
        NonFiniteOutput,
        NotOffered,
        Unauthenticated,
        PermissionDenied,
    )
}


def explained(error: Exception, who: str) -> Exception:
    """The ConfigError that names the extra with the module that `who` lacks; any other `error` as it is."""
    module = error.name.partition(".")[0] if isinstance(error, ModuleNotFoundError) and error.name else ""
    if module not in _EXTRAS:
        return error
    return ConfigError(f"{who} needs {module}, which is not installed: pip install 'moeserve[{_EXTRAS[module]}]'")


def from_status(code: grpc.StatusCode, message: str) -> MoEServeError:
    """The error a server raised, rebuilt on the client from its gRPC status."""
    return _BY_NAME.get(code.name, MoEServeError)(message)
