"""A host that computes when a test lets it."""

from __future__ import annotations

import threading

import torch

from moeserve.experts import ExpertBank
from tests.support.harness import ThreadedHost


class Held:
    """A bank that says when a pass begins, and waits for leave to compute it."""

    def __init__(self, host: ThreadedHost, layer: int) -> None:
        bank = host.holdings.bank_table.bank(layer, 1)
        assert bank is not None
        self._bank: ExpertBank = bank
        self.begun, self.leave = threading.Semaphore(0), threading.Semaphore(0)
        host.holdings.bank_table.put(layer, 1, self)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> object:
        return getattr(self._bank, name)

    def run(self, *args: torch.Tensor, out: torch.Tensor) -> None:
        self.begun.release()
        assert self.leave.acquire(timeout=30)
        self._bank.run(*args, out=out)
