"""The laws of the house that a machine can check."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import moeserve

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "moeserve"
GENERATED = PACKAGE / "v1"
PUBLIC_NAMES = {
    "AsyncClient",
    "BackgroundService",
    "Cancelled",
    "CheckpointError",
    "Client",
    "ConfigError",
    "DeadlineExceeded",
    "EmbeddedClient",
    "ExpertUnavailable",
    "ForwardOutput",
    "GatingConfig",
    "InvalidRequest",
    "MoELayer",
    "MoEServeError",
    "NonFiniteOutput",
    "Overloaded",
    "PermissionDenied",
    "Routing",
    "ServiceConfig",
    "Unauthenticated",
    "UnknownLayer",
    "connect_experts",
    "load_config",
    "load_model",
    "route",
    "serve",
}
ENGINE_ROOMS = ("frontend", "host", "gating", "experts", "checkpoints", "transport")
ENGINE = ("ray", "zmq", *(f"moeserve.{room}" for room in ENGINE_ROOMS))


def written_code() -> list[Path]:
    """Every Python file of the project but the generated ones."""
    paths = (path for folder in ("moeserve", "tests", "examples", "benchmarks") for path in (REPOSITORY / folder).rglob("*.py"))
    return sorted(path for path in paths if GENERATED not in path.parents)


def loaded_by(statements: str) -> set[str]:
    """The modules that a fresh Python has loaded after `import moeserve` and the given statements."""
    return set(run(sys.executable, "-c", f"import moeserve; {statements}; import sys; print(*sys.modules)").split())


def imported(path: Path) -> Iterator[str]:
    """Every module that the file names in an import, wherever the import stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(REPOSITORY).parts[: -node.level] if node.level else ()
            module = ".".join([*package, *filter(None, [node.module])])
            yield from (module, *(f"{module}.{alias.name}" for alias in node.names))


def run(*command: str) -> str:
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_imports_go_down_only() -> None:
    run(str(Path(sys.executable).with_name("lint-imports")), "--no-cache")


def test_only_the_cluster_imports_ray() -> None:
    who = {path for path in PACKAGE.rglob("*.py") if any(name.split(".")[0] == "ray" for name in imported(path))}
    assert who
    assert {path for path in who if path.parent != PACKAGE / "cluster" or not path.name.startswith("ray_")} == set()


def test_private_parts_of_ray_are_in_one_file() -> None:
    imported_or_named = r"\bray(\.\w+)*\._[a-z]|from ray(\.\w+)* import _|ray\.core\.generated"
    private = re.compile(rf"{imported_or_named}|internal_kv|\._actor_id|_global_node|ray_constants")
    owner = PACKAGE / "cluster" / "ray_internals.py"
    allowed = {owner, REPOSITORY / "tests" / "cluster" / "test_ray_internals.py"}
    assert private.search(owner.read_text())
    assert [path for path in written_code() if path not in allowed and path != Path(__file__) and private.search(path.read_text())] == []


def test_constants_of_time_of_the_cluster_are_in_one_table() -> None:
    constant, room = re.compile(r"^\w+_M?S(?:: \w+)? = |(?:sleep|Timer|timeout)[(=][0-9]", re.MULTILINE), PACKAGE / "cluster"
    table = {room / "timing.py", room / "keeper.py"}  # a keeper imports nothing
    assert [path for path in sorted(room.rglob("*.py")) if path not in table and constant.search(path.read_text())] == []


def test_no_test_imports_another_test() -> None:
    """What several of them use stands in tests/support, or in a module of their folder that is none."""
    borrowed = {
        f"{path.relative_to(REPOSITORY)} imports {name}"
        for path in (REPOSITORY / "tests").rglob("*.py")
        for name in imported(path)
        if name.startswith("tests.") and name.rpartition(".")[2].startswith(("test_", "conftest"))
    }
    assert not borrowed


def test_below_the_programs_nobody_takes_a_whole_configuration() -> None:
    rooms = ("bench", "cli", "compat", "config", "programs", "simulate")
    users = [path.relative_to(PACKAGE).parts for path in PACKAGE.rglob("*.py") if re.search(r"\bServiceConfig\b", path.read_text())]
    assert [parts for parts in sorted(users) if parts[0] not in (*rooms, "__init__.py")] == []


def test_public_names_are_pinned() -> None:
    assert set(moeserve.__all__) == PUBLIC_NAMES
    assert sorted(moeserve.__all__) == dir(moeserve)
    for name in PUBLIC_NAMES:
        assert getattr(moeserve, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'Clyent'"):
        moeserve.Clyent  # noqa: B018


def test_a_client_never_pays_for_the_engine() -> None:
    loaded = loaded_by("moeserve.Client; moeserve.ForwardOutput")
    assert "moeserve.client" in loaded
    assert not {name for name in loaded if name.startswith(ENGINE)}


def test_a_layer_in_this_process_needs_neither_ray_nor_sockets() -> None:
    loaded = loaded_by("moeserve.MoELayer; moeserve.route")
    assert "moeserve.layer.moe_layer" in loaded
    assert not {"ray", "zmq", "moeserve.transport", "moeserve.client"} & loaded


def test_files_and_functions_are_short() -> None:
    long = [path for path in written_code() if len(path.read_text().splitlines()) > 300]
    for path in written_code():
        if PACKAGE in path.parents:
            functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
            bodies = {function: (function.end_lineno or 0) - function.body[0].lineno + 1 for function in functions}
            long += [path / function.name for function, lines in bodies.items() if lines > 40]
    assert not long


def test_a_class_name_means_one_thing() -> None:
    """In compat/ names are those of the systems."""
    found: dict[str, list[Path]] = {}
    for path in PACKAGE.rglob("*.py"):
        if "compat" not in path.parts and "v1" not in path.parts:
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    found.setdefault(node.name, []).append(path)
    assert {name: paths for name, paths in found.items() if len(paths) > 1} == {}
