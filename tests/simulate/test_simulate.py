"""`moeserve simulate`: the answers of the command, and what holds of them for any cluster."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeserve.cli.app import main
from moeserve.config import load_config
from moeserve.placement import balancedness
from moeserve.simulate import SimulatedCluster, after_loss, experts_without_copy, load_of, played

KEYS = {"balancedness", "balancedness_before", "plan_seconds", "tokens_per_s", "p99_ms", "moves"}
SMALL = ("--layers", "2", "--experts", "32", "--top-k", "2", "--hosts", "8")
SOURCE = """
[[layers]]
name = "one"
hidden_size = 16
intermediate_size = 8
num_experts = 8
gating.top_k = 2
[placement]
num_hosts = 4
[balancing]
min_copies = {min_copies}
"""


def simulate(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert main(["simulate", *argv, "--json"]) == 0
    out, err = capsys.readouterr()
    assert not err
    told: dict[str, Any] = json.loads(out)
    return told


def source(folder: Path, min_copies: int = 1) -> str:
    file = folder / "service.toml"
    file.write_text(SOURCE.format(min_copies=min_copies))
    return str(file)


def test_balancing_evens_out_a_skewed_load_and_makes_it_faster(capsys: pytest.CaptureFixture[str]) -> None:
    skewed = (*SMALL, "--load", "zipf:1.2")
    told, few = simulate(capsys, *skewed, "--extra-copies", "0.5"), simulate(capsys, *skewed, "--extra-copies", "0")
    assert told.keys() >= KEYS and "lost_experts" not in told
    assert 0 < told["balancedness_before"] < 0.6 and told["balancedness"] > 0.9 > few["balancedness"]
    assert told["balancedness_before"] == few["balancedness_before"]
    assert told["tokens_per_s"] > few["tokens_per_s"] and told["p99_ms"] < few["p99_ms"]
    assert told["new"] == 32 and told["moves"] > 0 and told["plan_seconds"] > 0


def test_the_same_seed_gives_the_same_answer(capsys: pytest.CaptureFixture[str]) -> None:
    def asked(seed: int) -> dict[str, Any]:
        told = simulate(
            capsys, *SMALL, "--load", "lognormal:1", "--extra-copies", "0.2", "--nodes", "4", "--fail", "1", "--seed", str(seed)
        )
        return {key: value for key, value in told.items() if key != "plan_seconds"}

    assert asked(3) == asked(3) != asked(4)


def test_a_lost_host_loses_its_experts_unless_they_have_copies(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    alone = simulate(capsys, source(tmp_path), "--fail", "1", "--load", "zipf:0")
    assert (alone["lost_experts"], alone["moves"], alone["hosts"]) == (2, 2, 3)
    safe = simulate(capsys, source(tmp_path, min_copies=2), "--fail", "1", "--load", "zipf:0")
    assert (safe["lost_experts"], safe["moves"], safe["hosts"]) == (0, 4, 3)


def test_with_nodes_a_node_fails_with_all_its_hosts(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Copies are on different nodes, so that nothing is lost."""
    told = simulate(capsys, source(tmp_path, min_copies=2), "--nodes", "2", "--fail", "1", "--load", "zipf:0")
    assert (told["lost_experts"], told["hosts"]) == (0, 2)
    assert simulate(capsys, source(tmp_path), "--nodes", "2", "--fail", "1", "--load", "zipf:0")["lost_experts"] == 4


def test_what_is_said_to_people(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["simulate", source(tmp_path), "--fail", "1"]) == 0
    out, _ = capsys.readouterr()
    assert "Balancedness of 3 hosts" in out and "After the loss, 2 experts have no live copy" in out and "tokens/s" in out


def test_rows_of_a_load_by_hand_need_not_be_whole(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    told = []
    for unit in (0.001, 1000):
        trace = tmp_path / "trace.jsonl"
        lines = [{"at_s": second, "rows": [[unit * rows for rows in (9, 5, 3, 1, 1, 1, 1, 1)]]} for second in (1, 2)]
        trace.write_text("\n".join(map(json.dumps, [{"layers": {"one": 8}}, *lines])))
        told.append(simulate(capsys, source(tmp_path), "--load", str(trace), "--extra-copies", "0.5"))
    assert told[0]["balancedness_before"] == pytest.approx(told[1]["balancedness_before"])
    assert told[0]["balancedness_before"] < 0.8
    assert (told[0]["moves"], told[0]["new"]) == (told[1]["moves"], told[1]["new"]) and told[0]["new"] > 0


def test_a_recorded_load_is_played(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The hot expert changes; what counts is the window at the end. Zero rows say nothing."""
    trace = tmp_path / "trace.jsonl"
    hot = [[1000.0 if expert == hot else 10.0 for expert in range(8)] for hot in (0, 5)]
    lines = [{"at_s": 30.0 * (number + 1), "rows": [hot[number // 10]]} for number in range(20)]
    trace.write_text("\n".join(map(json.dumps, [{"layers": {"one": 8}}, *lines, {"at_s": 601, "rows": [[0] * 8]}])))
    told = simulate(capsys, source(tmp_path), "--load", str(trace), "--extra-copies", "0.5")
    assert told["balancedness"] > 0.9 > told["balancedness_before"]
    assert told["new"] + told["moves"] >= 6, "the copies of the first hot expert are of no use for the second"


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (("--hosts", "0"), "--hosts is 0; allowed: 1 to 65536"),
        (("--layers", "-1"), "--layers is -1; allowed: 1 to 4096"),
        (("--top-k", "300"), "--top-k is 300; allowed: 1 to --experts, 256"),
        (("--layers", "1", "--experts", "4", "--top-k", "1", "--hosts", "9"), "placement.num_hosts is 9; allowed: at most 4"),
        (("--nodes", "33"), "--nodes is 33; allowed: 1 to the number of hosts, 32"),
        (("--extra-copies", "-1"), "balancing.extra_copies"),
        (("--extra-copies", "nan"), "balancing.extra_copies"),
        (("--load", "zipf"), "--load is 'zipf'; allowed: zipf:S, lognormal:S, or a file"),
        (("--load", "zipf:x"), "--load is 'zipf:x'; allowed after the colon: a number from 0 to 20"),
        (("--load", "zipf:-1"), "allowed after the colon: a number from 0 to 20"),
        (("--load", "lognormal:inf"), "allowed after the colon: a number from 0 to 20"),
        (("--load", "x" * 300), "allowed: zipf:S, lognormal:S, or a file"),
        (("--load", "{folder}"), "allowed: zipf:S, lognormal:S, or a file"),
        (("--load", "{folder}/trace"), "has 1 layer of 8 experts; the layers to be simulated are 58 layers of 256 experts"),
        (("--load", "{folder}/service.toml"), "line 1 is no JSON object"),
        (("--fail", "32"), "--fail is 32; allowed: 0 to 31, because one of 32 hosts must be left"),
        (("--fail", "-1"), "--fail is -1; allowed: 0 to 31"),
        (("--nodes", "4", "--fail", "4"), "because one of 4 nodes must be left"),
        (("--layers", "4096", "--experts", "1048576"), "make 4294967296 experts; allowed: at most 4194304"),
        (("--concurrency", "4096", "--frontends", "1024"), "makes 4194304 requests; allowed: at most 16384"),
        (("--tokens", "1000000"), "--tokens is 1000000, with 8000000 rows of experts in a batch; allowed: at most 4194304"),
        (("--seed", "-1"), "--seed is -1"),
        (("--tokens", "0"), "--tokens is 0"),
        (("--costs", "{folder}/none"), "is not a readable file of costs"),
        (("--costs", "{folder}/costs"), "hop_s is -1; allowed: seconds from 0"),
        (("--layers", "1", "--costs", "{folder}/nothing"), "calls take no time by these costs"),
        (("{folder}/service.toml", "--experts", "8"), "--experts has no meaning with SOURCE"),
        (("{folder}/none.toml",), "does not exist"),
        (("--layers", "1", "--experts", "8", "--hosts", "2", "--plot", "{folder}/no/a.png"), "cannot be written"),
    ],
)
def test_nonsense_is_refused_in_one_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, argv: tuple[str, ...], sentence: str
) -> None:
    from dataclasses import replace

    from moeserve.bench.costs import REFERENCE
    from moeserve.bench.curve import Curve

    source(tmp_path)
    (tmp_path / "trace").write_text('{"layers": {"one": 8}}\n{"at_s": 1, "rows": [[1, 2, 3, 4, 5, 6, 7, 8]]}\n')
    (tmp_path / "costs").write_text(replace(REFERENCE, hop_s=-1).to_json())
    free = dict.fromkeys(("call_s", "batch_s", "expert_s"), Curve.line(0, 0)) | dict.fromkeys(
        ("hop_s", "sent_row_s", "summed_row_s", "pass_s"), 0
    )
    (tmp_path / "nothing").write_text(replace(REFERENCE, **free).to_json())
    if "--plot" in argv:
        pytest.importorskip("matplotlib", reason="the optional dependency `plot` is not installed")
    assert main(["simulate", *(each.format(folder=tmp_path) for each in argv)]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and err.count("\n") == 1 and sentence in err


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        (["{}"], "expected a line that names the layers"),
        (["{}", "{}"], 'line 1: expected {"layers":'),
        (['{"layers": {"one": 0}}', "{}"], "layer 'one' has 0 experts"),
        (['{"layers": {"one": 2}}', "7"], "line 2 is no JSON object"),
        (['{"layers": {"one": 2}}', '{"at_s": 0, "rows": [[1, 2]]}'], "line 2: at_s is 0; allowed: a number of seconds above 0"),
        (['{"layers": {"one": 2}}', '{"at_s": NaN, "rows": [[1, 2]]}'], "line 2: at_s is nan"),
        (['{"layers": {"one": 2}}', '{"at_s": 1, "rows": [[1, 2], [3]]}'], "line 2: expected rows of 1 layers"),
        (['{"layers": {"one": 2}}', '{"at_s": 1, "rows": [[1]]}'], "line 2: expected 2 numbers of rows of layer one"),
        (
            ['{"layers": {"one": 2}}', f'{{"at_s": 1{"0" * 400}, "rows": [[1, 2]]}}'],
            "allowed: a number of seconds above 0, the one before, up to 2^53",
        ),
        (['{"layers": {"one": 2}}', '{"at_s": 1, "rows": [[1, -2]]}'], "line 2: -2 rows of layer one; allowed: numbers from 0"),
        (['{"layers": {"one": 2}}', '{"at_s": 1, "rows": [[1, true]]}'], "line 2: True rows of layer one"),
        (['{"layers": {"one": 2}}', '{"at_s": 1, "rows": [[1, 2]]}', '{"at_s": 1, "rows": [[1, 2]]}'], "line 3: at_s is 1"),
    ],
)
def test_a_trace_that_is_none_is_refused_in_one_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, lines: list[str], sentence: str
) -> None:
    file = tmp_path / "trace"
    file.write_text("\n".join(lines))
    assert main(["simulate", source(tmp_path), "--load", str(file)]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and err.count("\n") == 1 and sentence in err


def test_a_plot_is_a_png(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="the optional dependency `plot` is not installed")
    simulate(capsys, source(tmp_path), "--plot", str(tmp_path / "a.png"))
    assert (tmp_path / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["simulate", source(tmp_path), "--plot", str(tmp_path / "a.png")]) == 2
    assert capsys.readouterr().err == "error: --plot needs matplotlib, which is not installed: pip install 'moeserve[plot]'\n"


@st.composite
def clusters(draw: st.DrawFn, min_copies: int = 1) -> SimulatedCluster:
    hosts, top_k = draw(st.integers(min_copies + 1, 8)), draw(st.integers(1, 3))
    layer = {
        "hidden_size": 4,
        "intermediate_size": 4,
        "num_experts": draw(st.integers(max(hosts, top_k), 24)),
        "gating": {"top_k": top_k},
    }
    balancing = {"extra_copies": draw(st.sampled_from([0.0, 0.25, 1.0])), "min_copies": min_copies}
    return SimulatedCluster.of(load_config({"layers": [layer] * draw(st.integers(1, 3)), "balancing": balancing}), hosts)


LOADS = st.builds(lambda law, number: f"{law}:{number}", st.sampled_from(["zipf", "lognormal"]), st.floats(0, 3))


@settings(max_examples=25, deadline=None)
@given(clusters(), LOADS, st.integers(0, 1000))
def test_balancing_makes_no_load_worse_and_then_moves_nothing(cluster: SimulatedCluster, load: str, seed: int) -> None:
    lines = load_of(load, cluster.planner.layers.specs, seed)
    now = played(cluster, lines)
    after = now.cluster.state.release.placement
    before, even = (balancedness(placement, lines[0].rows) for placement in (cluster.state.release.placement, after))
    assert 0 < before <= even + 1e-9 <= 1 + 2e-9
    again = played(now.cluster, lines)
    assert (again.moves, again.new) == (0, 0) and again.cluster.state.release.placement is after


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 3).flatmap(lambda copies: st.tuples(st.just(copies), clusters(copies))), LOADS, st.integers(0, 1000))
def test_fewer_losses_than_copies_lose_no_expert(case: tuple[int, SimulatedCluster], load: str, seed: int) -> None:
    copies, cluster = case
    now = played(cluster, load_of(load, cluster.planner.layers.specs, seed))
    hosts = [each.number for each in cluster.state.assignments]
    lost = set(np.random.default_rng(seed).choice(hosts, copies - 1, replace=False).tolist())
    assert experts_without_copy(now.cluster.state.release.placement, lost) == 0
    placement = after_loss(now, lost).cluster.state.release.placement
    assert set(placement.hosts) == set(hosts) - lost
    assert experts_without_copy(placement, set()) == 0


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 8), LOADS, st.integers(0, 1000))
def test_no_expert_is_asked_more_often_than_once_a_token(experts: int, top_k: int, load: str, seed: int) -> None:
    layer = {"hidden_size": 4, "intermediate_size": 4, "num_experts": experts, "gating": {"top_k": min(top_k, experts)}}
    cluster = SimulatedCluster.of(load_config({"layers": [layer]}), 1)
    (rows,) = load_of(load, cluster.planner.layers.specs, seed)[0].rows
    assert rows.sum() > 0 and (rows >= 0).all()
    assert rows.max() <= rows.sum() / min(top_k, experts) * (1 + 1e-6)
