"""How files of a configuration are written."""

from __future__ import annotations

from pathlib import Path

from moeserve import load_config


def test_a_file_of_an_editor_that_marks_utf_8(tmp_path: Path) -> None:
    (tmp_path / "marked.toml").write_text(
        '[model]\nname = "m\u00f6e"\n[[layers]]\nhidden_size = 8\nintermediate_size = 8\nnum_experts = 2', "utf-8-sig"
    )
    assert load_config(tmp_path / "marked.toml").model.name == "m\u00f6e"
