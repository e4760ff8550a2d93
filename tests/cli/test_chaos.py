"""`moeserve chaos`: a service breaks in every way on a schedule, and its callers notice nothing; and how that is counted."""

from __future__ import annotations

import json
import signal
import subprocess
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from moeserve.bench.chaos_findings import Findings, Injected, Phase
from moeserve.bench.chaos_load import ClientCall
from moeserve.bench.chaos_questions import make_questions
from moeserve.bench.chaos_schedule import FAULT_KINDS, Fault, FaultKind, schedule
from moeserve.bench.load import WrongAnswer
from moeserve.cli.app import main
from moeserve.config import load_config
from tests.support.processes import descendants, moeserve, running

LAYER = "[[layers]]\nhidden_size = 16\nintermediate_size = 8\nnum_experts = 8\ngating = {top_k = 2}\n"


@pytest.fixture
def source(tmp_path: Path) -> str:
    """Its own ports and tokens, and hosts that follow the load, must not matter: it is not that service which is broken."""
    file = tmp_path / "service.toml"
    access = '[server]\nport = 1\nmetrics_port = 1\ntls_cert = "none.pem"\ntls_key = "none.pem"\nauth_token_file = "none"\n'
    autoscaling = "[autoscaling]\nenabled = true\ntarget_busy = 0.001\nscale_up_after_s = 0.1\n"
    file.write_text(f"{LAYER}{access}{autoscaling}[ray]\nnum_cpus = 8\n[resilience]\nhang_after_ms = 300\n")
    return str(file)


def test_every_fault_on_hosts_that_are_threads(source: str) -> None:
    options = ("--cluster", "threads", "--every-s", "0.6", "--for-s", "3", "--clients", "2", "--json")
    with moeserve("chaos", source, *options, stdout=subprocess.PIPE) as process:
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0, out + err
    found = json.loads(out)
    assert found["faults"] == dict.fromkeys(FAULT_KINDS, 1)
    assert (found["failed"], found["wrong"], found["all_hosts_back"]) == (0, 0, True)
    assert found["sent"] == found["answered"] > 0
    assert found["longest_stall_ms"].keys() == set(FAULT_KINDS)
    assert found["longest_stall_ms"]["stop"] > 250, "someone waits until it is known that the host hangs"
    assert list(found["tokens_per_s"]) == ["before", "during", "after"] and all(found["tokens_per_s"].values())
    assert "loading 8 experts of 1 layer on 4 hosts" in err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--faults", "kill,fire"), "--faults has 'fire'; allowed: kill, stop, slow, nan, leave"),
        (("--faults", ""), "--faults has ''; allowed: kill"),
        (("--every-s", "0"), "--every-s is 0; allowed: 0.1 to 86400"),
        (("--for-s", "nan"), "--for-s is nan; allowed: more than 0"),
        (("--clients", "0"), "--clients is 0; allowed: 1 to 1024"),
        (("--hosts", "2", "--copies", "2"), "--faults has leave, and 2 hosts have 2 copies; allowed: more hosts than copies"),
        (("--hosts", "0"), "placement.num_hosts"),
    ],
)
def test_refused(source: str, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], sentence: str) -> None:
    assert main(["chaos", source, "--cluster", "threads", *options]) == 2
    assert sentence in capsys.readouterr().err


def test_a_ray_elsewhere_is_not_broken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "service.toml"
    file.write_text(f'{LAYER}[ray]\naddress = "10.0.0.1:6379"\n')
    assert main(["chaos", str(file)]) == 2
    assert "ray.address is '10.0.0.1:6379'; allowed: unset" in capsys.readouterr().err


@pytest.mark.parametrize("kinds", [FAULT_KINDS, ("kill", "stop")])
def test_the_same_seed_gives_the_same_faults(kinds: tuple[FaultKind, ...]) -> None:
    def faults(seed: int) -> list[Fault]:
        return list(islice(schedule(kinds, seed), 20))

    assert faults(3) == faults(3) != faults(4)
    for begin in range(0, 20, len(kinds)):
        assert {fault.kind for fault in faults(3)[begin : begin + len(kinds)]} == set(kinds)
    assert len({fault.kind for fault in faults(3)[:: len(kinds)]}) > 1, "in different orders"
    assert len({fault.victim for fault in faults(3)}) > 10


def test_figures() -> None:
    calls = [
        ClientCall(1.0, 1.5, 10, "right"),  # before
        ClientCall(9.9, 10.4, 10, "right"),  # a kill fell into it
        ClientCall(11.0, 12.0, 10, "wrong"),
        ClientCall(14.0, 15.2, 10, "right"),  # the stop that follows did not make it slow
        ClientCall(14.9, 17.9, 10, "UNAVAILABLE"),
        ClientCall(20.5, 20.75, 30, "right"),  # after
    ]
    phases = {"before": Phase(0, 2), "during": Phase(10, 20), "after": Phase(20, 22)}
    faults = [Injected("kill", 10.0), Injected("stop", 15.0), Injected("kill", 19.0)]
    findings = Findings(calls, ("kill", "stop", "nan"), faults, phases, is_whole=True, longest_lag_s=0.5)
    found = findings.as_json()
    assert (found["sent"], found["answered"], found["failed"], found["wrong"]) == (6, 5, 1, 1)
    assert found["errors"] == {"UNAVAILABLE": 1}
    assert found["faults"] == {"kill": 2, "stop": 1, "nan": 0}
    assert found["longest_stall_ms"] == pytest.approx({"kill": 1200.0, "stop": 3000.0, "nan": None})
    assert found["tokens_per_s"] == {"before": 5.0, "during": 2.0, "after": 15.0}
    assert found["p99_ms"] == pytest.approx({"before": 500.0, "during": 3000.0, "after": 250.0})
    assert found["longest_lag_ms"] == 500.0
    assert not findings.is_well
    assert not replace(findings, calls=calls[:2], is_whole=False).is_well
    assert replace(findings, calls=calls[:2]).is_well


def test_an_answer_is_compared() -> None:
    layer = {"hidden_size": 16, "intermediate_size": 8, "num_experts": 8, "gating": {"top_k": 2}}
    questions = make_questions(load_config({"layers": [layer] * 9, "server": {"max_tokens_per_request": 32}}), seed=1)
    assert {question.layer for question in questions} == {0, 2, 4, 6, 8}, "a few layers, spread over the model"
    assert {len(question.hidden_states) for question in questions} == {1, 16, 32}
    assert len({question.layer for question in questions[:6]}) > 1, "in random order"
    question = next(question for question in questions if len(question.hidden_states) == 16)
    right = question.expected
    question.check(replace(right, hidden_states=right.hidden_states * (1 + 1e-6)))
    rows = right.hidden_states
    for off in (rows * 1.01, rows[:8], rows.half(), torch.full_like(rows, torch.nan)):
        with pytest.raises(WrongAnswer):
            question.check(replace(right, hidden_states=off))
    one_off = rows.clone()
    one_off[3] += 0.1
    is_missing = torch.arange(16) == 3
    fewer = {"processed": right.processed - 1, "dropped": right.dropped + 1}
    question.check(replace(right, hidden_states=one_off, dropped_tokens=is_missing, **fewer))
    with pytest.raises(WrongAnswer, match="1 of 15 rows"):
        question.check(replace(right, hidden_states=one_off, dropped_tokens=torch.arange(16) == 4, **fewer))


def test_it_leaves_nothing_when_it_is_told_to_end(source: str) -> None:
    with moeserve("chaos", source, "--cluster", "threads") as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "without faults" in line:
                break
        started = descendants(process.pid)
        assert started, "clients are a process of their own"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
    assert not running(started)
