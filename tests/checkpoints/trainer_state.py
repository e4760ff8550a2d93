"""What a trainer may put into a file beside the model: objects of all kinds, each made anew."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import decimal
import enum
import functools
import operator
import random
import re
import types
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


class Color(enum.Enum):
    RED = 1


class Flags(enum.IntFlag):
    A = 1


@dataclasses.dataclass(frozen=True)
class Settings:
    lr: float = 0.1


class Point(NamedTuple):
    x: int = 0


class Slotted:
    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = torch.ones(3)


class OwnDict(dict[str, Any]):
    pass


class OwnList(list[Any]):
    pass


class Gone:
    """A class of a trainer that is not installed here: it is taken away when the file is written."""


class LossScaler:
    def __init__(self) -> None:
        self.cur_scale, self.dtype, self.owner = 2.0**16, torch.float16, self


def itself() -> list[Any]:
    found: list[Any] = []
    found.append(found)
    return found


#: what trainers have been seen to put beside the model, or may
BESIDE: Mapping[str, Callable[[], Any]] = {
    "arguments": lambda: argparse.Namespace(hidden_size=16, params_dtype=torch.float16, rank=np.int64(3), data_path=[Path("data")]),
    "numpy's random state": lambda: np.random.RandomState(1).get_state(),
    "a generator of numpy": lambda: np.random.default_rng(1),
    "Python's random state": random.getstate,
    "torch's random state": torch.get_rng_state,
    "arrays and scalars": lambda: [np.arange(6).reshape(2, 3), np.float32(1.5), np.array(["a", None], dtype=object), np.dtype("i4,f8")],
    "a loss scaler": LossScaler,
    "enums": lambda: {Color.RED: Flags.A},
    "a dataclass": lambda: {Settings(): Settings(2.0)},
    "a named tuple": Point,
    "slots": Slotted,
    "functions": lambda: [functools.partial(operator.add, 1), operator.itemgetter(2), len, torch.relu, F.gelu],
    "containers": lambda: [
        collections.deque([1, 2], 5),
        collections.defaultdict(list, {"a": [1]}),
        collections.Counter("aab"),
        {1, 2},
        frozenset({3}),
        OwnDict(a=1),
        OwnList([1]),
        types.SimpleNamespace(a=1),
    ],
    "a class": lambda: torch.optim.Adam,
    "an optimizer and a module": lambda: [nn.Linear(2, 2), torch.optim.SGD([torch.ones(2)], lr=0.1)],
    "paths, times, numbers": lambda: [
        Path("a"),
        datetime.datetime.now(datetime.UTC),
        decimal.Decimal("1.5"),
        uuid.uuid4(),
        re.compile("a"),
        1j,
        range(3),
        b"bytes",
        bytearray(b"x"),
        slice(1, 2),
        ...,
        10**700,
    ],
    "a class that is not here": Gone,
    "what holds itself": itself,
    "an exception": lambda: ValueError("a"),
    "tensors of other kinds": lambda: [torch.ones(2, 2).to_sparse(), torch.ones(2).to(torch.float8_e4m3fn), nn.Parameter(torch.ones(1))],
}
