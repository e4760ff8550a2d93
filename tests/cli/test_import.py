"""`moeserve config import`: another system's file in, a configuration that `serve` takes out."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import tomli_w
import yaml

from moeserve.cli.app import main
from moeserve.cli.import_file import to_toml
from moeserve.compat import SYSTEMS, load
from moeserve.config import load_config

MAPPINGS = {
    "deepspeed": {"hidden_size": 64, "num_experts": 8, "k": 2, "use_tutel": True},
    "colossalai": {"router": "Top2Router", "dim_model": 64, "num_experts": 8, "noisy_func": "NormalNoiseGenerator"},
    "mindformers": {"expert_num": 8, "num_experts_chosen": 2, "group_wise_a2a": True, "hidden_size": 64},
    "trustformers": {"expert_parallelism": {"top_k": 1}, "parallelism": {"dp_size": 2}, "hidden_size": 64},
}
WRITERS = {"json": json.dumps, "yaml": yaml.safe_dump, "yml": yaml.safe_dump, "toml": tomli_w.dumps}


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("system", SYSTEMS)
def test_it_writes_what_serve_takes(system: str, suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / f"layer.{suffix}", tmp_path / "service.toml"
    source.write_text(WRITERS[suffix](MAPPINGS[system]))
    assert main(["config", "import", "--from", system, str(source)]) == 0
    target.write_text(capsys.readouterr().out)
    imported = load(system, MAPPINGS[system])
    assert load_config(target) == imported.config
    comments = [line.removeprefix("# ") for line in target.read_text().splitlines() if line.startswith("#")]
    assert comments == [f"imported from layer.{suffix} ({system})", *(f"{note.field}: {note.what}" for note in imported.notes)]
    assert main(["config", "check", str(target)]) == 0


@pytest.mark.parametrize("name", [b"a\nb = 1.json", b"\xff.json"])
def test_the_name_of_the_file_is_one_comment(name: bytes, tmp_path: Path) -> None:
    source, target = tmp_path / os.fsdecode(name), tmp_path / "service.toml"
    imported = load("deepspeed", MAPPINGS["deepspeed"])
    target.write_text(to_toml(imported, "deepspeed", source), encoding="utf-8")
    assert load_config(target) == imported.config


#: each holds the one before twice: in words, longer than there is memory
DOUBLED = "&a0 1, " + ", ".join(f"&a{number} [*a{number - 1}, *a{number - 1}]" for number in range(1, 60))

#: each takes over the one before twice
MERGED = "\n".join(["a0: &a0 {x: 1}", *(f"a{number}: &a{number} {{<<: [*a{number - 1}, *a{number - 1}]}}" for number in range(1, 60))])


@pytest.mark.parametrize(
    ("name", "text", "system", "sentence"),
    [
        ("layer.json", "{", "deepspeed", "is not a readable JSON file"),
        ("layer.yaml", "a: [", "deepspeed", "is not a readable YAML file"),
        ("layer.toml", "a", "deepspeed", "is not a readable TOML file"),
        ("layer.json", "[" * 100_000, "deepspeed", "is not a readable JSON file"),
        ("layer.yaml", "[" * 2000, "deepspeed", "is not a readable YAML file"),
        ("layer.toml", "a = " + "[" * 100_000, "deepspeed", "is not a readable TOML file"),
        ("layer.yaml", "hidden_size: &a [*a]", "deepspeed", "hidden_size is [[[[...]]]]; allowed: an integer"),
        ("layer.yaml", f"hidden_size: [{DOUBLED}]", "deepspeed", "hidden_size is [1, [1, 1], [[1, 1], [1, 1]]"),
        ("layer.yaml", MERGED, "deepspeed", "'a0' is not a parameter (got {'x': 1})"),
        ("layer.ini", "", "deepspeed", "is of an unknown kind; allowed suffixes: .json, .toml, .yaml, .yml"),
        ("layer.json", "[]", "deepspeed", "deepspeed is []; allowed: a mapping"),
        ("layer.json", "{}", "megatron", "'megatron' is not a system"),
        ("layer.json", '{"hidden_size": 64, "kk": 1}', "deepspeed", "deepspeed: 'kk' is not a parameter (got 1)"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_2(
    name: str, text: str, system: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text(text)
    code = main(["config", "import", "--from", system, str(tmp_path / name)])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert sentence in err and err.startswith("error: ") and err.count("\n") == 1


def test_a_missing_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "import", "--from", "deepspeed", str(tmp_path / "x.json")]) == 2
    assert "x.json does not exist" in capsys.readouterr().err


def test_a_pipe_that_nobody_writes_into(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "x.yaml")
    assert main(["config", "import", "--from", "deepspeed", str(tmp_path / "x.yaml")]) == 2
    assert "x.yaml is not a readable YAML file: It is a pipe, not a file" in capsys.readouterr().err
