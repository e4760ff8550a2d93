"""What a call costs, in seconds: per call, row, message and pass. `moeserve bench --costs` measures it, `moeserve simulate` takes it.

T tokens of a batch, H hidden size, I intermediate size.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Final

from moeserve.bench.curve import Curve
from moeserve.config import MAX_SIZE
from moeserve.errors import ConfigError
from moeserve.files import read_file

_MAX_BYTES: Final = 2**16
_CURVES: Final = ("call_s", "batch_s", "expert_s")
#: a cost above this is a mistake
_MOST_S: Final = 3600.0
_MOST_VALUES: Final = 1000


@dataclass(frozen=True)
class Costs:
    """Seconds, for experts of the sizes at which they were measured.

    call_s: of a call by its tokens, between a caller and the frontend, both ways
    batch_s: of a batch in the frontend by its tokens: the gate, and the plan of who computes what
    hop_s, sent_row_s: of a message to a host, and of each row in it, one for a token however many experts it has there
    summed_row_s: of each row that comes back and is added up
    pass_s, expert_s: on a host, of a pass, and of each expert in it by its rows
    spread: what the same call took again and again, divided by its mean: as many equally frequent values
    """

    hidden_size: int
    intermediate_size: int
    call_s: Curve
    batch_s: Curve
    hop_s: float
    sent_row_s: float
    summed_row_s: float
    pass_s: float
    expert_s: Curve
    spread: tuple[float, ...] = (1.0,)

    def scaled(self, hidden_size: int, intermediate_size: int) -> Costs:
        """For experts of other sizes: rows are as long as H, weights and their work as large as H * I."""
        wide, large = hidden_size / self.hidden_size, hidden_size * intermediate_size / (self.hidden_size * self.intermediate_size)
        return replace(
            self,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            call_s=self.call_s.stretched(wide),
            batch_s=self.batch_s.stretched(wide),
            sent_row_s=self.sent_row_s * wide,
            summed_row_s=self.summed_row_s * wide,
            expert_s=self.expert_s.scaled(large),
        )

    def to_json(self) -> str:
        """As `read_costs` takes it."""
        values = {name: value.points if isinstance(value, Curve) else value for name, value in vars(self).items()}
        return json.dumps(values) + "\n"


#: roughly a server of two cores, float32, hosts with one thread each: for a first look, `--costs` has those of a machine
REFERENCE: Final = Costs(
    hidden_size=1024,
    intermediate_size=1024,
    call_s=Curve.line(1e-3, 5e-6),
    batch_s=Curve.line(0.4e-3, 1e-6),
    hop_s=0.1e-3,
    sent_row_s=1e-6,
    summed_row_s=1e-6,
    pass_s=0.2e-3,
    expert_s=Curve.line(0.75e-3, 45e-6),
)


def read_costs(path: Path) -> Costs:
    """Raises ConfigError naming the file, the key and what is allowed."""
    try:
        found = json.loads(read_file(path, _MAX_BYTES))
    except OSError as error:
        raise ConfigError(f"{path} is not a readable file of costs: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not a readable file of costs: {error}") from None
    names = [field.name for field in fields(Costs)]
    if not isinstance(found, dict) or set(found) != set(names):
        raise ConfigError(f"{path} has other keys than costs have, which are {', '.join(names)}")
    spread = found.pop("spread")
    if not isinstance(spread, list) or not 0 < len(spread) <= _MOST_VALUES or not all(_is_number(each, _MOST_S) for each in spread):
        raise ConfigError(f"{path}: spread is {spread!r:.80}; allowed: 1..{_MOST_VALUES} numbers from 0 to {_MOST_S:g}")
    for name, value in found.items():
        if name in _CURVES:
            found[name] = _curve(value, f"{path}: {name}")
        elif not name.endswith("_s"):
            if not (type(value) is int and 0 < value <= MAX_SIZE):
                raise ConfigError(f"{path}: {name} is {value!r:.80}; allowed: 1..{MAX_SIZE}")
        elif not _is_number(value, _MOST_S):
            raise ConfigError(f"{path}: {name} is {value!r:.80}; allowed: seconds from 0 to {_MOST_S:g}")
    return Costs(**found, spread=tuple(spread))


def _curve(found: object, where: str) -> Curve:
    """Raises ConfigError."""
    points = found if isinstance(found, list) and 0 < len(found) <= _MOST_VALUES else []
    if not points or not all(
        isinstance(one, list) and len(one) == 2 and all(_is_number(value, MAX_SIZE) for value in one) for one in points
    ):
        raise ConfigError(f"{where} is {found!r:.80}; allowed: 1..{_MOST_VALUES} pairs of a size and seconds, [[1, 0.001], ...]")
    sizes, seconds = zip(*points, strict=True)
    if max(seconds) > _MOST_S or any(left >= right for left, right in pairwise(sizes)):
        raise ConfigError(f"{where} is {found!r:.80}; allowed: growing sizes, and seconds from 0 to {_MOST_S:g}")
    return Curve(tuple(map(tuple, points)))


def _is_number(value: object, most: float) -> bool:
    return type(value) in (int, float) and 0 <= value <= most  # type: ignore[operator]
