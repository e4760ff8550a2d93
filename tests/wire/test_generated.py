"""The committed generated code is what protoc makes of the committed protos."""

from __future__ import annotations

from pathlib import Path

from grpc_tools import protoc

import moeserve.v1

PROTOS = Path(__file__).parents[2] / "protos"
COMMITTED = Path(moeserve.v1.__file__).parent


def test_regenerating_changes_nothing(tmp_path: Path) -> None:
    protos = [str(path) for path in sorted(PROTOS.glob("moeserve/v1/*.proto"))]
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    assert protoc.main(["protoc", f"--proto_path={PROTOS}", *outputs, *protos]) == 0

    fresh = {path.name: path.read_text() for path in (tmp_path / "moeserve/v1").iterdir()}
    committed = {path.name: path.read_text() for path in COMMITTED.glob("*_pb2*")}
    assert fresh == committed
