"""Types of keys of the configuration that allow less than a plain type."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from moeserve.addresses import host_of

Dtype = Literal["float32", "float16", "bfloat16"]
Bits = Literal["int8", "fp8"]
Quantization = Literal["int8", "fp8", "none"]
#: the code that computes feed-forward experts on CPUs: the fastest as measured, torch's operators, or a compiled kernel
Kernel = Literal["auto", "torch", "amx", "avx512_bf16", "avx512", "avx2", "generic"]
#: how the answer of a shared expert is added to that of the chosen ones
Mixing = Literal["add", "average", "sigmoid", "residual"]
CopyChoice = Literal["least_outstanding", "round_robin"]
#: which experts share a host: neighbours in id, or dealt out in turn
Strategy = Literal["contiguous", "round_robin"]

#: Requested sizes are compared with these bounds before any allocation or loop. No service comes near them.
MAX_HOSTS: Final = 2**16
MAX_LAYERS: Final = 2**12
MAX_EXPERTS: Final = 2**20
#: copies and shards of the experts of all layers
MAX_PHYSICAL: Final = 2**22
#: of a tensor, and of all counts of tokens
MAX_SIZE: Final = 2**31 - 1
_MAX_BYTES: Final = 2**60
_YEAR_S: Final = 365 * 86_400.0

Size = Annotated[int, Field(ge=1, le=MAX_SIZE)]
Experts = Annotated[int, Field(ge=1, le=MAX_EXPERTS)]
Name = Annotated[str, Field(min_length=1)]
Hosts = Annotated[int, Field(ge=1, le=MAX_HOSTS)]
#: of every expert; or by layer name; or by layer name and expert; "default" = all others
Copies = Hosts | dict[str, Hosts | dict[str, Hosts]]
Bytes = Annotated[int, Field(ge=1, le=_MAX_BYTES)]
Seconds = Annotated[float, Field(ge=0, le=_YEAR_S)]


def _number_or_all(value: Any) -> Any:
    return int(value) if isinstance(value, str) and re.fullmatch("[0-9]{1,20}", value) else value


NumHosts = Annotated[Hosts | Literal["all"], BeforeValidator(_number_or_all)]


def _host(value: str) -> str:
    try:
        return host_of(value)
    except ValueError as error:
        raise PydanticCustomError("host", "{reason}", {"reason": str(error)}) from None


Host = Annotated[str, AfterValidator(_host)]
Port = Annotated[int, Field(ge=0, le=65535)]


def _named(value: Any) -> Any:
    if value == "":  # to Python, it is the working directory
        raise PydanticCustomError("path", "Input should be a path")
    return value


File = Annotated[Path, Field(strict=False), BeforeValidator(_named)]


def _position_or_name(value: Any) -> Any:
    if type(value) not in (int, str):
        raise ValueError(f"model.layers must contain positions or names of MoE layers (got {value!r})")
    return value


LayerKey = Annotated[int | str, BeforeValidator(_position_or_name)]


def most_copies(copies: Copies) -> int:
    """The largest number that any expert has."""
    layers = copies.values() if isinstance(copies, dict) else [copies]
    return max((number for layer in layers for number in (layer.values() if isinstance(layer, dict) else [layer])), default=1)
