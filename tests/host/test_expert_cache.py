"""What stays in the memory of a host that has more experts than room; and that sums are the same, bit by bit."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeserve.config import Kernel
from moeserve.errors import CheckpointError
from moeserve.experts import BankForm, Expert, ExpertBank, HeldExpert, Placer, quantize
from moeserve.experts.held import Alone
from moeserve.host import ExpertCache, Loadable, SpilledBank
from moeserve.transport import Loads
from tests.experts.oracle import HIDDEN_SIZE, kernels, run, some_weights, some_work
from tests.support.waiting import PATIENCE_S

BYTES = [3, 5, 1, 8, 2, 4, 6]
LIMIT = 12
PASSES = st.lists(st.lists(st.sampled_from(range(len(BYTES))), min_size=1, max_size=4, unique=True), max_size=12)


class Shelf:
    """Experts of BYTES bytes by number, and who reads them."""

    def __init__(self, limit: int = LIMIT) -> None:
        self.cache = ExpertCache(limit)
        self.read: list[int] = []
        self.unreadable: set[int] = set()
        self.most = 0

    def wanted(self, number: int) -> Loadable:
        return Loadable(number, BYTES[number], lambda: self._read(number), lambda expert: self._place(number, expert))

    def run(self, numbers: Sequence[int]) -> None:
        with self.cache.held([self.wanted(number) for number in numbers]) as held:
            assert [each.held for each in held] == list(numbers)  # type: ignore[attr-defined]
            assert all(number in self.cache.experts for number in numbers)
            self.most = max(self.most, self.cache.nbytes)

    def _read(self, number: int) -> Any:
        self.read.append(number)
        self.most = max(self.most, self.cache.nbytes)
        if number in self.unreadable:
            raise CheckpointError(f"{number} cannot be read")
        return number

    def _place(self, number: int, expert: Any) -> HeldExpert:
        assert expert == number
        self.most = max(self.most, self.cache.nbytes + BYTES[number])
        return Alone(expert)


@given(passes=PASSES)
def test_the_least_recently_used_make_room(passes: list[list[int]]) -> None:
    shelf, model, read = Shelf(), OrderedDict[int, None](), []
    fitting = [numbers for numbers in passes if sum(BYTES[number] for number in numbers) <= LIMIT]
    for numbers in fitting:
        shelf.run(numbers)
        read += [number for number in numbers if number not in model]
        for number in numbers:
            model.pop(number, None)
            model[number] = None
        while sum(BYTES[number] for number in model) > LIMIT:
            model.popitem(last=False)
        assert list(shelf.cache.experts) == list(model)
        assert shelf.cache.nbytes == sum(BYTES[number] for number in model) <= LIMIT
    assert shelf.read == read and shelf.most <= LIMIT
    assert shelf.cache.loads == Loads(sum(map(len, fitting)), len(read))


def test_what_a_change_reads_gets_room_while_passes_that_take_all_of_it_follow_each_other() -> None:
    shelf, done = Shelf(), threading.Event()
    change = threading.Thread(target=lambda: (shelf.cache.load(shelf.wanted(1), evicts=True), done.set()), daemon=True)
    end = time.monotonic() + PATIENCE_S
    while not done.is_set():
        assert time.monotonic() < end, "it gets no room"
        with shelf.cache.held([shelf.wanted(number) for number in (3, 5)]):
            if change.ident is None:
                change.start()
            done.wait(0.001)  # what a pass computes takes


@settings(max_examples=20)
@given(passes=st.lists(PASSES, min_size=2, max_size=4))
def test_passes_side_by_side_keep_to_the_limit_and_all_end(passes: list[list[list[int]]]) -> None:
    shelf, failures = Shelf(), list[BaseException]()

    def work(own: list[list[int]]) -> None:
        try:
            for numbers in own:
                if sum(BYTES[number] for number in numbers) <= LIMIT:
                    shelf.run(numbers)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(own,), daemon=True) for own in passes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not failures and not any(thread.is_alive() for thread in threads)
    assert shelf.most <= LIMIT


def test_what_a_pass_computes_with_stays_until_it_leaves() -> None:
    shelf, entered, done = Shelf(), threading.Event(), list[int]()

    def other() -> None:
        entered.set()
        shelf.run([6])
        done.append(1)

    thread = threading.Thread(target=other)
    with shelf.cache.held([shelf.wanted(0), shelf.wanted(1)]):
        shelf.run([2])
        thread.start()
        assert entered.wait(30)
        shelf.cache.keep(())
        assert set(shelf.cache.experts) == {0, 1} and not done
    thread.join(30)
    assert done and set(shelf.cache.experts) == {6, 1}
    shelf.cache.keep([6])
    assert list(shelf.cache.experts) == [6]


def test_what_cannot_be_read_takes_no_room_and_is_tried_again() -> None:
    shelf = Shelf()
    shelf.run([0])
    shelf.unreadable = {3, 1}
    for _ in range(2):
        with pytest.raises(CheckpointError, match="1 cannot be read"):
            shelf.run([2, 1, 4])
        with pytest.raises(CheckpointError, match="3 cannot be read"):
            shelf.run([3, 4])
    assert set(shelf.cache.experts) == {0, 2}, "nothing has made room"
    assert shelf.cache.nbytes == BYTES[0] + BYTES[2]
    shelf.unreadable = set()
    shelf.run([2, 1, 4])
    assert shelf.read == [0, 2, 1, 3, 1, 3, 1, 4]


def test_before_a_pass_wants_it_an_expert_is_read_if_there_is_room() -> None:
    shelf = Shelf()
    assert [shelf.cache.load(shelf.wanted(number), evicts=False) for number in (3, 4, 0, 2)] == [True, True, False, True]
    assert shelf.cache.load(shelf.wanted(4), evicts=False), "it is there"
    assert shelf.cache.load(shelf.wanted(0), evicts=True)
    assert set(shelf.cache.experts) == {2, 4, 0}
    assert shelf.cache.loads == Loads()


def test_what_is_claimed_stays_and_what_has_no_room_is_not_claimed() -> None:
    shelf, entered, done = Shelf(), threading.Event(), list[int]()

    def claim(*numbers: int) -> bool:
        return shelf.cache.claim([shelf.wanted(number) for number in numbers])

    def other() -> None:
        entered.set()
        shelf.run([3, 4])
        done.append(1)

    assert not claim(0), "it is not in memory"
    shelf.run([0, 1])
    assert claim(0) and claim(0, 1)
    shelf.cache.keep(())
    thread = threading.Thread(target=other)
    thread.start()
    assert entered.wait(30)
    assert set(shelf.cache.experts) == {0, 1} and not done, "the pass has no room"
    shelf.cache.let_go()
    thread.join(30)
    assert done and claim(4) and not claim(0)
    shelf.cache.let_go()
    with shelf.cache.held([shelf.wanted(3), shelf.wanted(4)]):
        assert not claim(2) and claim(3), "beside a pass that takes all there is"
        shelf.cache.let_go()


def test_a_pass_that_waits_for_room_goes_first() -> None:
    shelf, done = Shelf(), threading.Event()

    def other() -> None:
        shelf.run([3, 4])
        done.set()

    shelf.run([0])
    assert shelf.cache.claim([shelf.wanted(0)])
    thread = threading.Thread(target=other)
    thread.start()
    while not done.is_set():  # as a host does that always has something to compute
        shelf.cache.let_go()
        shelf.cache.claim([shelf.wanted(0)])
    thread.join(30)
    shelf.cache.let_go()


def test_a_pass_with_what_it_has_claimed_does_not_wait_for_who_waits_for_that() -> None:
    shelf, waits = Shelf(), threading.Event()

    class Wanted(list[Loadable]):
        """Of a pass that looks for room, and waits when that is done."""

        def __iter__(self) -> Iterator[Loadable]:
            waits.set()
            return super().__iter__()

    def wait_for_room() -> None:
        with shelf.cache.held(Wanted([shelf.wanted(3), shelf.wanted(4)])):
            pass

    def compute() -> None:
        shelf.run([0])
        assert shelf.cache.claim([shelf.wanted(0)])
        other.start()
        assert waits.wait(30)
        shelf.run([0])
        shelf.cache.let_go()

    other, host = (threading.Thread(target=target, daemon=True) for target in (wait_for_room, compute))
    host.start()
    host.join(30)
    other.join(30)
    assert not host.is_alive() and not other.is_alive()


FORMS: list[dict[str, Any]] = [{}, {"deterministic": True}, {"scale_inputs": True}]


@pytest.mark.parametrize(
    ("dtype", "kernel"), [(dtype, kernel) for dtype in (torch.float32, torch.bfloat16) for kernel in kernels(dtype)], ids=str
)
@settings(max_examples=8)
@given(data=st.data())
def test_sums_are_bit_by_bit_those_of_experts_that_are_all_in_memory(dtype: torch.dtype, kernel: Kernel, data: st.DataObject) -> None:
    """Of one kind, and of kinds that are not computed together, whichever of them have to be read between two others."""
    form = data.draw(st.sampled_from(FORMS))
    counts = data.draw(st.lists(st.integers(0, 4), min_size=6, max_size=6).filter(any))
    alike = some_weights(4, "swiglu", True, dtype).experts("swiglu")
    experts: list[Expert] = [*alike[:2], quantize(alike[2], "int8"), *some_weights(2, "geglu", False, dtype).experts("geglu"), alike[3]]
    held = list(Placer(torch.device("cpu"), kernel, "deterministic" in form).placed(experts))
    whole = ExpertBank(held[:5], HIDDEN_SIZE, dtype, shared=held[5], **form)
    room = data.draw(st.integers(max(each.nbytes for each in held), sum(each.nbytes for each in held)))
    placer = Placer(torch.device("cpu"), kernel, "deterministic" in form)
    wanted = [Loadable(number, each.nbytes, each.expert, lambda expert: next(placer.placed([expert]))) for number, each in enumerate(held)]
    cache = ExpertCache(room)
    spilled = SpilledBank(wanted, BankForm(HIDDEN_SIZE, dtype, has_shared=True, **form), cache)
    work = some_work(tuple(counts), 5, dtype)
    for _ in range(2):
        assert torch.equal(run(spilled, work), run(whole, work))
        assert cache.nbytes <= room
    assert spilled.claim(torch.tensor([len(held)])), "the host refuses what does not exist, and nobody waits for it"
