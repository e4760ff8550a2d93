"""Names that look like rich's markup are shown as they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from moeserve.cli.app import main
from tests.support.harness import ServiceHarness

NAMES = ["[/b] first", "[bold]second", "third:fire:"]
LAYERS = [{"name": name, "hidden_size": 16, "intermediate_size": 8, "num_experts": 4} for name in NAMES]


def missing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *argv: str) -> list[str]:
    """The names that a wide terminal does not show."""
    monkeypatch.setenv("COLUMNS", "140")
    assert main(argv) == 0
    shown = capsys.readouterr().out
    return [name for name in NAMES if name not in shown]


def test_of_layers_that_are_served(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (token := tmp_path / "admin").write_text("of the administrator")
    with ServiceHarness({"layers": LAYERS, "server": {"admin_token_file": token}}, "local", tmp_path) as service:
        assert missing(capsys, monkeypatch, "top", service.target, "--once") == []
        assert missing(capsys, monkeypatch, "status", service.target, "--admin-token-file", str(token)) == []


def test_of_layers_that_are_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    tables = ["[[layers]]\n" + "".join(f"{key} = {value!r}\n" for key, value in layer.items()) for layer in LAYERS]
    (source := tmp_path / "layers.toml").write_text("".join(tables))
    assert missing(capsys, monkeypatch, "plan", str(source)) == []


def test_what_is_no_terminal_gets_whole_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As a file, or grep."""
    monkeypatch.delenv("COLUMNS", raising=False)
    long = "model.decoder.transformer_blocks." * 4
    (source := tmp_path / "layers.toml").write_text(
        f'[[layers]]\nname = "{long}"\nhidden_size = 16\nintermediate_size = 8\nnum_experts = 64\n'
    )
    assert main(["plan", str(source), "--num-hosts", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(long in line and "top 2" in line for line in lines)
    assert any(line.split()[0] == "host-0" and line.rstrip().endswith("63") for line in lines if line.strip())
