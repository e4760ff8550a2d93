"""The committed generated code is what protoc makes of the committed protos."""

from __future__ import annotations

from pathlib import Path

from grpc_tools import protoc

import moeserve.v1
from tests.support.wire_page import DOCUMENT, page

PROTOS = Path(__file__).parents[2] / "protos"
COMMITTED = Path(moeserve.v1.__file__).parent


def test_regenerating_changes_nothing(tmp_path: Path) -> None:
    protos = [str(path) for path in sorted(PROTOS.glob("moeserve/v1/*.proto"))]
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    assert protoc.main(["protoc", f"--proto_path={PROTOS}", *outputs, *protos]) == 0

    fresh = {path.name: path.read_text() for path in (tmp_path / "moeserve/v1").iterdir()}
    committed = {path.name: path.read_text() for path in COMMITTED.glob("*_pb2*")}
    assert fresh == committed


def test_regenerating_the_other_protocol_changes_nothing(tmp_path: Path) -> None:
    """Its messages are made of its descriptors, in a pool of their own."""
    outputs = [f"--pyi_out={tmp_path}", f"--descriptor_set_out={tmp_path}/inference/open_inference.binpb"]
    (tmp_path / "inference").mkdir()
    assert protoc.main(["protoc", f"--proto_path={PROTOS}", *outputs, str(PROTOS / "inference/open_inference.proto")]) == 0
    for path in (tmp_path / "inference").iterdir():
        assert path.read_bytes() == (COMMITTED / "inference" / path.name).read_bytes(), path.name


def test_the_reference_says_what_the_protos_say() -> None:
    written = DOCUMENT.read_text(encoding="utf-8")
    assert written == page(), "run: python -m tests.support.wire_page"
    rows = [line.split(" | ") for line in written.splitlines() if line.startswith("| ") and "`" in line]
    assert all(row[-1].strip(" |") for row in rows), "every field and method has a comment"
    assert len(rows) > 300
