"""Parameters of requests, inputs and outputs: those that mean something here are honored, others are refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from moeserve.api.request import RequestOptions
from moeserve.errors import InvalidRequest

Value = TypeVar("Value")

_REGION, _BYTE_SIZE, _OFFSET = "shared_memory_region", "shared_memory_byte_size", "shared_memory_offset"
#: what Triton's clients call what is always so here: every response is the final one of its request
FINAL_RESPONSE: Final = "triton_final_response"
#: what KServe's client says of every input that it sends raw
RAW_SIZE: Final = "binary_data_size"
_WANTS_FINAL: Final = "triton_enable_empty_final_response"
_TIMEOUT: Final = "timeout"


@dataclass(frozen=True)
class Shared:
    """Bytes of a registered region of shared memory."""

    region: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Options:
    """`timeout_s`: from the arrival of the request; None = as the call says. `gating`: what it changes of the layer's gate."""

    timeout_s: float | None
    gating: RequestOptions


def of_input(parameters: Mapping[str, Any], what: str) -> tuple[Shared | None, int | None]:
    """Where the bytes of an input are, as `shared_of`, and how many its caller says that they are. Raises InvalidRequest."""
    given = _Given(parameters, what)
    nbytes = given.take(RAW_SIZE, int)
    return _shared(given, what, RAW_SIZE), nbytes


def shared_of(parameters: Mapping[str, Any], what: str) -> Shared | None:
    """Where the bytes of a tensor are; None = in the message. Raises InvalidRequest."""
    return _shared(_Given(parameters, what), what)


def _shared(given: _Given, what: str, *taken: str) -> Shared | None:
    region, size, offset = given.take(_REGION, str), given.take(_BYTE_SIZE, int), given.take(_OFFSET, int)
    given.require_empty(_REGION, _BYTE_SIZE, _OFFSET, *taken)
    if region is None and (size, offset) == (None, None):
        return None
    if region is None or size is None or size < 0 or (offset or 0) < 0:
        raise InvalidRequest(f"{what} needs {_REGION} and a {_BYTE_SIZE} and {_OFFSET} that are not negative", what.split()[1])
    return Shared(region, offset or 0, size)


def in_shared(parameters: Any, where: Shared) -> None:
    """Says in the parameters of an output where it was written."""
    parameters[_REGION].string_param = where.region
    parameters[_BYTE_SIZE].int64_param = where.nbytes
    if where.offset:
        parameters[_OFFSET].int64_param = where.offset


def options_of(parameters: Mapping[str, Any]) -> Options:
    """The parameters of a request. Raises InvalidRequest."""
    given = _Given(parameters, "the request")
    timeout_us = given.take(_TIMEOUT, int)
    gating: RequestOptions = {
        "capacity_factor": given.take("capacity_factor", float),
        "noise": given.take("noise", str),
        "seed": given.take("seed", int),
    }
    given.take(_WANTS_FINAL, bool)
    given.require_empty(_TIMEOUT, *gating, _WANTS_FINAL)
    if timeout_us is not None and timeout_us < 0:
        raise InvalidRequest(f"timeout is {timeout_us}; allowed: microseconds, 0 = none", _TIMEOUT)
    if (seed := gating["seed"]) is not None and not 0 <= seed < 2**63:
        raise InvalidRequest(f"seed is {seed}; allowed: 0..2^63-1", "seed")
    return Options(timeout_us / 1e6 if timeout_us else None, gating)


class _Given:
    """Parameters that nobody has taken yet."""

    def __init__(self, parameters: Mapping[str, Any], what: str) -> None:
        self._left = {name: _value(parameter) for name, parameter in parameters.items()}
        self._what = what

    def take(self, name: str, kind: type[Value]) -> Value | None:
        if name not in self._left:
            return None
        value = self._left.pop(name)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if type(value) is not kind:
            raise InvalidRequest(f"parameter {name} of {self._what} is {value!r:.80}; allowed: {_KINDS[kind]}", name)
        return value

    def require_empty(self, *allowed: str) -> None:
        if self._left:
            name = min(self._left)
            raise InvalidRequest(f"{self._what} has a parameter {name[:80]!r}; allowed: {', '.join(allowed)}", "parameters")


_KINDS: Final = {str: "a text", int: "a whole number", float: "a number", bool: "a bool"}


def _value(parameter: Any) -> Any:
    chosen = parameter.WhichOneof("parameter_choice")
    return None if chosen is None else getattr(parameter, chosen)
