"""Faults of hosts on purpose, as `moeserve chaos` injects them into hosts that it has started itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from moeserve.experts import ExpertBank
from moeserve.host import Host


class FaultInjector(Protocol):
    """Breaks hosts of one fleet, by their numbers. Everything may block; from any thread."""

    def kill(self, number: int) -> None:
        """As kill -9: what it computes is lost, and its fleet starts it again."""
        ...

    def stop(self, number: int) -> Callable[[], None]:
        """As SIGSTOP; what is returned is called to let it go on."""
        ...

    def poison(self, number: int, for_s: float) -> None:
        """Its sums are NaN for so long."""
        ...


def poison(host: Host, for_s: float) -> None:
    """The sums of all work that comes to `host` within `for_s` are NaN, as if its memory were broken."""
    table: Any = host.holdings.bank_table
    if not isinstance(table.bank, _PoisonedTable):
        table.bank = _PoisonedTable(table.bank)
    table.bank.until = time.monotonic() + for_s


class _PoisonedTable:
    """In place of the method `bank` of a bank table, for the rest of the host's life."""

    def __init__(self, bank: Callable[[int, int], ExpertBank | None]) -> None:
        self._bank = bank
        #: monotonic seconds
        self.until = 0.0

    def __call__(self, layer: int, epoch: int) -> ExpertBank | _PoisonedBank | None:
        bank = self._bank(layer, epoch)
        return bank if bank is None or time.monotonic() >= self.until else _PoisonedBank(bank)


@dataclass(frozen=True)
class _PoisonedBank:
    """In place of an `ExpertBank`; two of the same one are equal, so that their work is merged."""

    bank: Any

    def __getattr__(self, name: str) -> Any:
        return getattr(self.bank, name)

    def run(self, *args: torch.Tensor, out: torch.Tensor) -> None:
        """As `ExpertBank.run`, but the sums are NaN."""
        self.bank.run(*args, out=out)
        out.fill_(float("nan"))
