"""The datatypes of the Open Inference Protocol that tensors of a layer have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch

from moeserve.server.inference.messages import pb


@dataclass(frozen=True)
class Datatype:
    """`contents`: the field of InferTensorContents for its numbers; None = it is only sent raw. `config`: as ModelConfig says it."""

    name: str
    dtype: torch.dtype
    contents: str | None
    config: pb.DataType


_ALL: Final = (
    Datatype("FP32", torch.float32, "fp32_contents", pb.TYPE_FP32),
    Datatype("FP16", torch.float16, None, pb.TYPE_FP16),
    Datatype("BF16", torch.bfloat16, None, pb.TYPE_BF16),
    Datatype("INT64", torch.int64, "int64_contents", pb.TYPE_INT64),
    Datatype("INT32", torch.int32, "int_contents", pb.TYPE_INT32),
    Datatype("BOOL", torch.bool, "bool_contents", pb.TYPE_BOOL),
)
DATATYPES: Final[Mapping[str, Datatype]] = {one.name: one for one in _ALL}
BY_DTYPE: Final[Mapping[torch.dtype, Datatype]] = {one.dtype: one for one in _ALL}
