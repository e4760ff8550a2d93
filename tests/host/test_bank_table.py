"""Banks by epoch: what is asked for at an epoch is what was valid then."""

from __future__ import annotations

import pytest
import torch

from moeserve.experts import ExpertBank
from moeserve.host.bank_table import BankTable
from tests.support.closeness import assert_close
from tests.support.stacked import Stacked


def bank(seed: int) -> ExpertBank:
    generator = torch.Generator().manual_seed(seed)
    stacked = Stacked(torch.randn(2, 8, 4, generator=generator), torch.randn(2, 4, 4, generator=generator))
    return ExpertBank(stacked.experts("swiglu"), 4, torch.float32)


def test_each_epoch_has_its_bank() -> None:
    bank_table, old, new = BankTable(), bank(0), bank(1)
    bank_table.put(3, 2, old)
    bank_table.put(3, 5, new)
    assert [bank_table.bank(3, epoch) for epoch in (1, 2, 4, 5, 9)] == [None, old, old, new, new]
    assert bank_table.bank(0, 9) is None
    bank_table.put(3, 7, None)
    assert [bank_table.bank(3, epoch) for epoch in (6, 7)] == [new, None]


def test_what_nobody_asks_for_any_more_is_forgotten() -> None:
    bank_table, old, new = BankTable(), bank(0), bank(1)
    bank_table.put(0, 1, old)
    bank_table.put(0, 4, new)
    bank_table.retire(3)
    assert (bank_table.bank(0, 3), bank_table.bank(0, 4)) == (old, new)
    bank_table.retire(4)
    assert (bank_table.bank(0, 3), bank_table.bank(0, 4)) == (None, new)


def test_a_later_attempt_at_the_same_epoch_takes_the_place_of_the_first() -> None:
    bank_table, old, first, second = BankTable(), bank(0), bank(1), bank(2)
    for epoch, held in ((1, old), (2, first), (2, second)):
        bank_table.put(0, epoch, held)
    assert (bank_table.bank(0, 1), bank_table.bank(0, 2)) == (old, second)


def test_banks_share_experts() -> None:
    old, other = bank(0), bank(1)
    new = ExpertBank([old.held[0], other.held[1]], 4, torch.float32)
    work = torch.randn(3, 4), torch.tensor([0, 1, 2]), torch.tensor([0, 1, 1]), torch.ones(3)
    outs = []
    for each in (old, other, new):
        outs.append(torch.empty(3, 4))
        each.run(*work, out=outs[-1])
    assert_close(outs[2][0], outs[0][0])
    assert_close(outs[2][1:], outs[1][1:])
    with pytest.raises(AssertionError):
        assert_close(outs[2][1:], outs[0][1:])
