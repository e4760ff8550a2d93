"""Which faults come, in which order."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

FaultKind = Literal["kill", "stop", "slow", "nan", "leave"]
FAULT_KINDS: Final[tuple[FaultKind, ...]] = get_args(FaultKind)
_MANY: Final = 2**31


@dataclass(frozen=True)
class Fault:
    """For the host at position `victim` among all hosts, modulo their number."""

    kind: FaultKind
    victim: int


def schedule(kinds: Sequence[FaultKind], seed: int) -> Iterator[Fault]:
    """Faults without end, the same for the same arguments. Each kind comes once, in random order, before any comes again."""
    chance = random.Random(seed)  # noqa: S311 - to be reproduced
    while True:
        for kind in chance.sample(kinds, len(kinds)):
            yield Fault(kind, chance.randrange(_MANY))
