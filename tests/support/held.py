"""A host that computes when a test lets it, or fails or dies then."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from moeserve.cluster.thread_host import ThreadHost
from moeserve.experts import ExpertBank
from tests.support.waiting import PATIENCE_S


class Held:
    """A bank that says when a pass begins, and waits for leave to compute it; it raises `error` instead, and dies of `Killed`."""

    def __init__(self, host: ThreadHost, layer: int = 0) -> None:
        bank = host.host.holdings.bank_table.bank(layer, 1)
        assert bank is not None
        self._bank: ExpertBank = bank
        self.begun, self.leave = threading.Semaphore(0), threading.Semaphore(0)
        self.error: BaseException | None = None
        #: of each pass
        self.rows: list[int] = []
        host.host.holdings.bank_table.put(layer, 1, _InItsPlace(self.run, bank))  # type: ignore[arg-type]

    def let_go(self) -> None:
        """No pass waits from now on."""
        self.leave.release(1000)

    def run(self, *args: torch.Tensor, out: torch.Tensor) -> None:
        self.rows.append(len(args[0]))
        self.begun.release()
        assert self.leave.acquire(timeout=PATIENCE_S)
        if self.error is not None:
            raise self.error
        self._bank.run(*args, out=out)


class Poisoned(Held):
    """Its sums are NaN, as if its weights were, until it is cured."""

    is_cured = False

    def run(self, *args: torch.Tensor, out: torch.Tensor) -> None:
        super().run(*args, out=out)
        if not self.is_cured:
            out.fill_(float("nan"))


class _InItsPlace:
    """A bank that is run in another way."""

    def __init__(self, run: Callable[..., None], bank: ExpertBank) -> None:
        self.run = run
        self._bank = bank

    def __getattr__(self, name: str) -> object:
        return getattr(self._bank, name)
