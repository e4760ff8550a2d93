"""Which kernel computes the experts of a shape: measured once, said once, or as configured."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from moeserve.experts import ROWS, Choice, FeedForward, Shape, measured
from moeserve.experts.choice import chosen
from moeserve.experts.packable import packable
from moeserve.kernels import KERNELS, fastest_of

SHAPE = Shape(torch.float32, torch.float32, "swiglu", 64, 96, 2)


@pytest.fixture(autouse=True)
def as_it_is_chosen_in_a_service(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Measured as long as it takes, and not before."""
    monkeypatch.setattr("moeserve.experts.choice._ALL_BYTES", 2**23)
    monkeypatch.setattr("moeserve.experts.choice._LONGEST_S", float("inf"))
    measured.cache_clear()
    yield
    measured.cache_clear()


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "moeserve.experts.choice"]


def test_what_is_chosen_was_fastest() -> None:
    choice = measured(SHAPE, "auto", False)
    totals = {name: torch.tensor(row).log().mean().exp().item() for name, row in choice.microseconds.items()}
    best = min(totals[name] for name in totals if name in KERNELS)
    assert choice.kernel is not None, "torch's operators, one expert after the other, for experts as small as these"
    assert totals[choice.kernel] <= 1.05 * best
    for index, form in enumerate(choice.forms):
        assert choice.microseconds[form][index] == min(choice.microseconds[name][index] for name in ("linear", "transposed"))


def test_it_is_measured_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    shape = Shape(torch.bfloat16, torch.bfloat16, "relu", 32, 32, 2)
    with caplog.at_level(logging.INFO):
        first, second = measured(shape, "auto", False), measured(shape, "auto", False)
    assert first is second
    (line,) = said(caplog)
    assert line.startswith(f"kernel for experts of bfloat16 relu, 32 x 32, 2 threads: {first.kernel or 'torch'}")


def test_hosts_that_load_side_by_side_choose_alike() -> None:
    """As threads of one process do: each has the same kernel, so that copies have the same bits."""
    expert = packable(FeedForward("swiglu", torch.zeros(192, 48), torch.zeros(48, 96)))
    assert expert is not None
    together = threading.Barrier(4)

    def load(_: int) -> Choice:
        torch.set_num_threads(1)
        together.wait(30)
        return chosen(expert)

    with ThreadPoolExecutor(4) as hosts:
        first, *others = hosts.map(load, range(4))
    assert all(other is first for other in others)


def test_torch_is_measured_alone_when_it_is_asked_for() -> None:
    choice = measured(SHAPE, "torch", False)
    assert choice.kernel is None
    assert choice.microseconds.keys() == {"linear", "transposed"}
    assert all(len(row) == len(ROWS) for row in choice.microseconds.values())


def test_on_a_busy_machine_less_is_measured(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("moeserve.experts.choice._LONGEST_S", 0.0)
    choice = measured(SHAPE, "auto", False)
    assert {len(row) for row in choice.microseconds.values()} == {1}
    assert len(choice.forms) == len(ROWS)
    assert said(caplog)[-1] == "this machine is busy: kernels were tried for 0 s, with up to 1 row"


def test_what_is_configured_is_not_measured() -> None:
    expert = packable(FeedForward("swiglu", torch.zeros(64, 32), torch.zeros(32, 32)))
    assert expert is not None
    assert chosen(expert, "generic") == Choice("generic", ("linear",) * len(ROWS), {})


def test_the_fastest_run_counts_and_all_take_turns() -> None:
    turns: list[str] = []
    seconds = fastest_of({name: lambda name=name: turns.append(name) for name in ("a", "b")}, rounds=2)  # type: ignore[misc]
    assert turns == ["a", "b", "a", "b"]
    assert all(0 < taken < 1 for taken in seconds.values())
