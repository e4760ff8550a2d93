"""What a call costs, in seconds: per call, row, message and pass. `moeserve bench --costs` measures it, `moeserve simulate` takes it.

T tokens of a batch, H hidden size, I intermediate size.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Final

from moeserve.config import MAX_SIZE
from moeserve.errors import ConfigError
from moeserve.files import read_file

_MAX_BYTES: Final = 2**16
#: a cost above this is a mistake
_MOST_S: Final = 3600.0
_MOST_VALUES: Final = 1000


@dataclass(frozen=True)
class Costs:
    """Seconds, for experts of the sizes at which they were measured.

    call_s, call_token_s: of a call and of each of its tokens, between a caller and the frontend, both ways
    batch_s, token_s: of a batch in the frontend and of each of its tokens: the gate, and the plan of who computes what
    hop_s, sent_row_s: of a message to a host, and of each row in it, one for a token however many experts it has there
    summed_row_s: of each row that comes back and is added up
    pass_s, expert_s, row_s: on a host, of a pass, of each expert in it, whose weights are read, and of each row of an expert
    spread: what the same call took again and again, divided by its mean: as many equally frequent values
    """

    hidden_size: int
    intermediate_size: int
    call_s: float
    call_token_s: float
    batch_s: float
    token_s: float
    hop_s: float
    sent_row_s: float
    summed_row_s: float
    pass_s: float
    expert_s: float
    row_s: float
    spread: tuple[float, ...] = (1.0,)

    def scaled(self, hidden_size: int, intermediate_size: int) -> Costs:
        """For experts of other sizes: rows are as long as H, weights and their work as large as H * I."""
        wide, large = hidden_size / self.hidden_size, hidden_size * intermediate_size / (self.hidden_size * self.intermediate_size)
        by_width = {name: getattr(self, name) * wide for name in ("call_token_s", "token_s", "sent_row_s", "summed_row_s")}
        by_work = {name: getattr(self, name) * large for name in ("expert_s", "row_s")}
        return replace(self, hidden_size=hidden_size, intermediate_size=intermediate_size, **by_width, **by_work)

    def to_json(self) -> str:
        """As `read_costs` takes it."""
        return json.dumps(asdict(self), indent=2) + "\n"


#: roughly a server of two cores, float32, hosts with one thread each: for a first look, `--costs` has those of a machine
REFERENCE: Final = Costs(
    hidden_size=1024,
    intermediate_size=1024,
    call_s=1e-3,
    call_token_s=5e-6,
    batch_s=0.4e-3,
    token_s=1e-6,
    hop_s=0.1e-3,
    sent_row_s=1e-6,
    summed_row_s=1e-6,
    pass_s=0.2e-3,
    expert_s=0.75e-3,
    row_s=45e-6,
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
        is_size = not name.endswith("_s")
        if is_size and not (type(value) is int and 0 < value <= MAX_SIZE):
            raise ConfigError(f"{path}: {name} is {value!r}; allowed: 1..{MAX_SIZE}")
        if not is_size and not _is_number(value, _MOST_S):
            raise ConfigError(f"{path}: {name} is {value!r}; allowed: seconds from 0 to {_MOST_S:g}")
    return Costs(**found, spread=tuple(spread))


def _is_number(value: object, most: float) -> bool:
    return type(value) in (int, float) and 0 <= value <= most  # type: ignore[operator]
