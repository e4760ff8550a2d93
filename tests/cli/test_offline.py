"""What the command line says without starting anything: plans, checks, and one sentence per mistake."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moeserve.cli.app import main

LAYER = "[[layers]]\nhidden_size = 16\nintermediate_size = 8\nnum_experts = 4\n"


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = main(list(argv))
    out, err = capsys.readouterr()
    return code, out, err


def test_plan_of_a_checkpoint(capsys: pytest.CaptureFixture[str], tiny_moe: Path) -> None:
    code, out, _ = run(capsys, "plan", str(tiny_moe), "--num-hosts", "3")
    assert code == 0
    assert "model.layers.3.mlp" in out and "host-2" in out and "3 hosts" in out


def test_plan_cuts_no_name_and_shows_the_limit_in_force(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    file = tmp_path / "service.toml"
    file.write_text(
        LAYER
        + "name = 'a-layer-with-a-name-of-sixty-letters-that-fits-no-column-at-all'\n"
        + "gating.capacity_factor = 1.25\n"
        + "gating.drop_tokens = false\n"
    )
    code, out, _ = run(capsys, "plan", str(file))
    assert code == 0
    assert "…" not in out
    assert "unlimited" in out and "1.25" not in out


@pytest.mark.parametrize(("before", "after", "moves"), [(4, 5, 12), (5, 4, 12), (4, 4, 0)])
def test_plan_of_a_change(capsys: pytest.CaptureFixture[str], tmp_path: Path, before: int, after: int, moves: int) -> None:
    """A new host takes its share, 4 layers x 16 experts / 5, and whoever leaves leaves its share; nothing else moves."""
    file = tmp_path / "service.toml"
    file.write_text(LAYER.replace("num_experts = 4", "num_experts = 16") * 4)
    code, out, _ = run(capsys, "plan", str(file), "--num-hosts", str(after), "--from-hosts", str(before), "--json")
    told = json.loads(out)
    assert code == 0
    assert abs(told["moves"] - moves) <= 1 and told["moves"] + told["kept"] == 64 and told["new"] == 0
    assert told["hosts"] == after and sum(told["weights_bytes_per_host"]) == 64 * 3 * 16 * 8 * 4
    assert told["moved_bytes"] == told["moves"] * 3 * 16 * 8 * 4
    assert len(told["peak_bytes_per_host"]) == max(before, after) and max(told["peak_bytes_per_host"]) <= 16 * 3 * 16 * 8 * 4
    code, out, _ = run(capsys, "plan", str(file), "--num-hosts", str(after), "--from-hosts", str(before))
    assert code == 0 and f"{told['moves']} experts move" in out.replace("\n", " ")


def test_plan_of_a_change_says_what_hosts_with_a_gpu_hold_meanwhile(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """One of 16 experts leaves each of 3 hosts: of the 4 that each has, 3 are copied to a stack of their own."""
    file, one = tmp_path / "service.toml", 3 * 16 * 8 * 4
    asked = ("plan", str(file), "--num-hosts", "5", "--from-hosts", "4")
    placing = "[placement]\ngpus_per_host = 1\n"
    file.write_text(LAYER.replace("num_experts = 4", "num_experts = 16") + placing)
    code, out, _ = run(capsys, *asked, "--json")
    assert (code, sorted(json.loads(out)["peak_bytes_per_host"])) == (0, [3 * one, 4 * one, *[7 * one] * 3])
    file.write_text(LAYER.replace("num_experts = 4", "num_experts = 16") + placing + f"memory_per_host_bytes = {6 * one}\n")
    code, _, errors = run(capsys, *asked)
    assert code == 2 and "of weights while this change happens, but placement.memory_per_host_bytes allows" in errors


def test_plan_of_a_change_counts_the_copies_that_balancing_asks_for(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "service.toml"
    file.write_text(LAYER.replace("num_experts = 4", "num_experts = 16") + "[balancing]\nmin_copies = 2\n")
    code, out, _ = run(capsys, "plan", str(file), "--num-hosts", "3", "--from-hosts", "4", "--json")
    told = json.loads(out)
    assert (code, told["moves"], told["new"]) == (0, 4, 16)


def test_plan_of_a_change_goes_in_steps_where_the_service_does(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """2 copies of 15 experts fill 3 of 5 hosts: one of those that stay has to give an expert away before it gets the last one."""
    file, one = tmp_path / "service.toml", 3 * 16 * 8 * 4
    placing = f"[placement]\ncopies = 2\nmemory_per_host_bytes = {10 * one}\n"
    file.write_text(LAYER.replace("num_experts = 4", "num_experts = 15") + placing)
    code, out, _ = run(capsys, "plan", str(file), "--num-hosts", "3", "--from-hosts", "5", "--json")
    assert (code, max(json.loads(out)["peak_bytes_per_host"])) == (0, 10 * one)


def test_plan_of_more_experts_than_memory(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """4 experts on 2 hosts, of which each has room for one; with less, or with modules, nothing can be read."""
    file, one = tmp_path / "service.toml", 3 * 16 * 8 * 4
    limit = f"[placement]\nnum_hosts = 2\nmemory_per_host_bytes = {one}\n"
    file.write_text(LAYER + limit)
    code, _, errors = run(capsys, "plan", str(file))
    assert code == 2 and "placement.memory_per_host_bytes allows" in errors and "store.spill" in errors
    spill = "[store]\nspill = 'disk'\n"
    file.write_text(LAYER + limit + spill)
    code, out, _ = run(capsys, "plan", str(file), "--json", "--from-hosts", "1")
    told = json.loads(out)
    assert code == 0
    assert told["weights_bytes_per_host"] == [2 * one] * 2
    assert told["memory_bytes_per_host"] == told["peak_bytes_per_host"] == [one] * 2
    code, out, _ = run(capsys, "plan", str(file))
    assert code == 0 and "Experts spill: 0.0 MiB of 0.0 MiB are in memory" in out.replace("\n", " ")
    file.write_text(LAYER + limit.replace(str(one), str(one - 1)) + spill)
    code, _, errors = run(capsys, "plan", str(file))
    assert code == 2 and f"placement.memory_per_host_bytes is {one - 1}, but an expert of layer layers.0 has {one} bytes" in errors
    module = (
        "[[layers]]\nhidden_size = 4\nnum_experts = 2\nexpert = 'torch.nn:Linear'\nexpert_args = { in_features = 4, out_features = 4 }\n"
    )
    file.write_text(module + limit + spill)
    code, _, errors = run(capsys, "plan", str(file))
    assert code == 2 and "the experts of layer layers.0 are modules, which may keep a state" in errors


def test_python_m_finds_experts_in_the_working_folder(tmp_path: Path) -> None:
    """`moeserve` does not look there, and says where it looks."""
    (tmp_path / "experts_of_mine.py").write_text("from torch.nn import Linear as Mine\n")
    (tmp_path / "service.toml").write_text(
        "[[layers]]\nhidden_size = 4\nnum_experts = 2\nexpert = 'experts_of_mine:Mine'\n"
        "expert_args = { in_features = 4, out_features = 4 }\n"
    )
    ends = {}
    for how in (("-m", "moeserve"), ("-c", "import sys; sys.path.remove(''); from moeserve.cli.app import entry; entry()")):
        ends[how[0]] = subprocess.run(
            [sys.executable, *how, "config", "check", "service.toml"], cwd=tmp_path, capture_output=True, text=True, check=False
        )
    assert (ends["-m"].returncode, ends["-m"].stdout) == (0, "service.toml: ok, 1 MoE layer on 1 host\n")
    assert ends["-c"].returncode == 2 and "its module must be installed or on PYTHONPATH" in ends["-c"].stderr


def test_a_ray_that_does_not_start_is_one_sentence(tmp_path: Path) -> None:
    """It is to have more GPUs than there may be."""
    (tmp_path / "service.toml").write_text(LAYER + "[server]\nport = 0\nmetrics_port = 0\n[ray]\nnum_gpus = 3\n")
    ended = subprocess.run(
        [sys.executable, "-m", "moeserve", "serve", "service.toml"],
        cwd=tmp_path,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr and "error: a local Ray did not start: " in ended.stderr


def test_help_shows_defaults_that_depend_on_other_options(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    for verb, default in (("bench", "(8)"), ("chaos", "(as SOURCE says, else 4, and 2 copies)"), ("simulate", "(one for each host)")):
        assert f"[default: {default}]" in run(capsys, verb, "--help")[1]


def test_a_timeout_is_refused_in_words_of_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, errors = run(capsys, "ping", "127.0.0.1:1", "--timeout", "0")
    assert (code, errors) == (2, "error: --timeout is 0.0; allowed: seconds, more than 0, or inf for no limit\n")


def test_environment_loses_to_flags_and_wins_over_the_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "service.toml"
    file.write_text(LAYER + "[placement]\nnum_hosts = 1\n")
    assert "1 host " in run(capsys, "plan", str(file))[1]
    monkeypatch.setenv("MOESERVE_NUM_HOSTS", "2")
    assert "2 hosts" in run(capsys, "plan", str(file))[1]
    assert "4 hosts" in run(capsys, "plan", str(file), "--num-hosts", "4")[1]


def test_ray_is_told_when_a_node_goes_so_never_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "leave", "--address", "127.0.0.1:1", "--timeout-s", "inf")
    assert code == 2 and "Invalid value for '--timeout-s': Input should be less than or equal to 1000000000" in err


def test_flags_turn_off_what_environment_or_file_turn_on(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "service.toml"
    file.write_text("[model]\ndeterministic = true\n[balancing]\nenabled = true\n" + LAYER)
    assert "model.deterministic is true, but balancing" in run(capsys, "plan", str(file))[2]
    monkeypatch.setenv("MOESERVE_DETERMINISTIC", "true")
    assert run(capsys, "plan", str(file), "--no-deterministic")[0] == 0


def test_a_value_of_a_flag_or_of_the_environment_is_not_said_to_be_of_the_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "service.toml"
    file.write_text(LAYER + "[server]\nport = 'x'\n")
    assert run(capsys, "plan", str(file))[2].startswith(f"error: {file}: server.port: ")
    monkeypatch.setenv("MOESERVE_PORT", "70000")
    assert run(capsys, "plan", str(file))[2].startswith("error: flags or environment: server.port: ")
    assert run(capsys, "plan", str(file), "--port", "-1")[2].endswith("(got -1)\n")


def test_a_cluster_that_does_not_answer_leaves_no_folder(tmp_path: Path) -> None:
    folder = tmp_path / "tmp"
    folder.mkdir()
    (tmp_path / "service.toml").write_text(LAYER + '[server]\nadmin_token_file = "token"\n[ray]\naddress = "127.0.0.1:1"\n')
    command = [sys.executable, "-m", "moeserve", "deploy", "service.toml"]
    environment = {**os.environ, "TMPDIR": str(folder)}
    end = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
    assert (end.returncode, end.stderr.splitlines()[1:]) == (2, ["error: no Ray cluster answers at 127.0.0.1:1: Connection refused"])
    assert not [one for one in folder.iterdir() if one.name.startswith("moeserve-")]


def test_config_check(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "service.toml"
    file.write_text(LAYER)
    assert run(capsys, "config", "check", str(file))[:2] == (0, f"{file}: ok, 1 MoE layer on 1 host\n")
    file.write_text(LAYER + '[placement]\nnum_hosts = "all"\n')
    assert run(capsys, "config", "check", str(file))[:2] == (0, f"{file}: ok, 1 MoE layer on 1 host or more\n")


@pytest.mark.parametrize(
    ("toml", "sentence"),
    [
        ("", "nothing to serve"),
        ("[servr]\n", "servr is not a key"),
        (LAYER + "[server]\nauth_token_file = 3\n", "server.auth_token_file: Input should be a path (got 3)"),
        (LAYER + "[server]\nport = 'x'\n", "server.port: Input should be a valid integer (got 'x')"),
        (LAYER + "[layers.gating]\ntop_k = 5\n", "gating.top_k is 5, but it has 4 experts"),
        (LAYER + "[resilience]\nk_min = 3\n", "layer layers.0: resilience.k_min is 3; allowed: at most 2, the choices of a token"),
        (LAYER + "[layers.resilience]\nk_min = 3\n", "layer layers.0: resilience.k_min is 3; allowed: at most 2"),
        (LAYER + "[balancing]\nmin_copies = 2\n", "balancing.min_copies is 2 with 1 host; allowed: at most 1"),
        (LAYER + "[placement]\nnum_hosts = 5\n", "num_hosts is 5; allowed: at most 4, the number of physical experts"),
        (LAYER + "[placement.copies]\n'layer.0' = 2\n", "placement.copies names layer 'layer.0', which is not served; served: layers.0"),
        (LAYER + "[server]\nhost = '0.0.0.0'\n", "server.host 0.0.0.0 can be reached from other machines"),
        ("[model]\ncheckpoint = 'nowhere'\n", "nowhere does not exist"),
        ("[model\n", "not a readable TOML file"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_2(capsys: pytest.CaptureFixture[str], tmp_path: Path, toml: str, sentence: str) -> None:
    file = tmp_path / "service.toml"
    file.write_text(toml)
    for verb in (("config", "check"), ("serve",)):
        code, out, err = run(capsys, *verb, str(file))
        assert (code, out) == (2, "")
        *before, last = err.splitlines()
        assert sentence in last and last.startswith("error: ")
        assert [line.startswith("starting moeserve ") for line in before] == [True] * (verb == ("serve",))


def test_usage_mistakes_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "serve")[0] == 2
    code, _, err = run(capsys, "serve", "x.toml", "--port", "many")
    assert code == 2 and "--port" in err and "'many'" in err
    code, _, err = run(capsys, "plan", "x.toml", "--from-hosts", "0")
    assert code == 2 and "--from-hosts" in err and "'0'" in err
    assert run(capsys, "no-such-verb")[0] == 2
    code, _, err = run(capsys, "serve", "no-such-file.toml")
    assert code == 2 and "no-such-file.toml does not exist" in err


def test_infer_says_what_is_wrong_with_its_input(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    output = str(tmp_path / "y.safetensors")
    missing = run(capsys, "infer", "127.0.0.1:1", "--layer", "0", "--input", str(tmp_path / "x"), "--output", output)
    assert missing[0] == 2 and "is not a readable safetensors file" in missing[2]
    save_file({"x": torch.zeros(1)}, tmp_path / "x")
    unnamed = run(capsys, "infer", "127.0.0.1:1", "--layer", "0", "--input", str(tmp_path / "x"), "--output", output)
    assert unnamed[0] == 2 and "has no tensor hidden_states; it has: x" in unnamed[2]
    save_file({"hidden_states": torch.zeros(1, 4)}, tmp_path / "x")
    unreachable = run(capsys, "infer", "127.0.0.1:1", "--layer", "0", "--input", str(tmp_path / "x"), "--output", output, "--timeout", "2")
    assert unreachable[0] == 3 and "127.0.0.1:1" in unreachable[2]


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert run(capsys, "--version") == (0, f"moeserve {project['version']}\n", "")


@pytest.mark.parametrize(("value", "is_shown"), [("1", True), ("0", False), ("false", False), ("", False)])
def test_an_environment_asks_for_tracebacks(
    value: str, is_shown: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MOESERVE_DEBUG", value)
    assert main(["plan", "/there/is/no/such/file"]) == 2
    assert ("Traceback" in capsys.readouterr().err) == is_shown
