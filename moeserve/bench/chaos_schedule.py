"""Which faults come when."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

FaultKind = Literal["kill", "stop", "slow", "nan", "leave"]
FAULT_KINDS: Final[tuple[FaultKind, ...]] = get_args(FaultKind)
_MANY: Final = 2**31


@dataclass(frozen=True)
class Fault:
    """Due `at_s` after the first one, for the host at position `victim` among all hosts, modulo their number."""

    kind: FaultKind
    at_s: float
    victim: int


def schedule(kinds: Sequence[FaultKind], every_s: float, for_s: float, seed: int) -> list[Fault]:
    """One fault every `every_s` within `for_s`, at least one. Each kind comes once, in random order, before any comes again.

    The same arguments give the same faults.
    """
    chance = random.Random(seed)  # noqa: S311 - to be reproduced
    faults: list[Fault] = []
    waiting: list[FaultKind] = []
    while not faults or len(faults) * every_s < for_s:
        waiting = waiting or chance.sample(kinds, len(kinds))
        faults.append(Fault(waiting.pop(), len(faults) * every_s, chance.randrange(_MANY)))
    return faults
