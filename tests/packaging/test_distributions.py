"""What is published: the sdist, the wheel made of it, and the wheel installed where there is no source tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).parents[2]
VERSION = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
KERNELS = "moeserve/kernels/_native" + sysconfig.get_config_var("EXT_SUFFIX")
SOURCES = "moeserve/kernels/csrc/"


def run(*command: str | Path, cwd: Path) -> str:
    """What the command prints; it sees neither the source tree nor this process's settings of Python."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of everything that packages are made of, without what was built in place."""
    tree = tmp_path_factory.mktemp("packaging") / "tree"
    tree.mkdir()
    for path in REPOSITORY.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, tree)
    for name in ("moeserve", "protos"):
        shutil.copytree(REPOSITORY / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    return tree


@pytest.fixture(scope="module")
def built(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with both; the wheel is built from the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, tree, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def bin_folder(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a new environment with the wheel, which takes dependencies from the one that runs the tests."""
    environment = tmp_path_factory.mktemp("installed") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=built)
    python = environment / "bin" / "python"
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--no-deps",
        "--no-index",
        "--no-compile",
        *built.glob("*.whl"),
        cwd=built,
    )
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=built))
    (packages / "dependencies.pth").write_text("\n".join({sysconfig.get_path(name) for name in ("purelib", "platlib")}))
    return environment / "bin"


def test_the_sdist_holds_what_is_needed_to_build_and_to_read(tree: Path, built: Path) -> None:
    with tarfile.open(built / f"moeserve-{VERSION}.tar.gz") as archive:
        members = archive.getmembers()
    assert all(member.isfile() or member.isdir() for member in members)
    held = {member.name.partition("/")[2] for member in members if member.isfile()}
    assert not {name for name in files(tree) if name.startswith(("moeserve/", "protos/"))} - held
    assert {"LICENSE", "README.md", "CHANGELOG.md", "constraints.txt", "pyproject.toml"} <= held


def test_the_wheel_holds_the_package_and_nothing_else(tree: Path, built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if not name.startswith(f"moeserve-{VERSION}.dist-info/")}
    package = {name for name in files(tree) if name.startswith("moeserve/") and not name.startswith(SOURCES)}
    assert held - {KERNELS} == package
    assert KERNELS in held or not shutil.which("cc"), "the kernels in C were not compiled"
    kinds = ("/py.typed", ".pyi", ".proto", ".html", ".css", ".js")
    assert all(any(name.endswith(kind) for name in held) for kind in kinds)


def test_every_proto_is_beside_the_code_that_was_generated_from_it(tree: Path, built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name: archive.read(name) for name in archive.namelist() if name.endswith(".proto")}
    protos = tree / "protos"
    found = {str(path.relative_to(protos)): path.read_bytes() for path in protos.rglob("*.proto")}
    # The package of the other protocol has no room of its own.
    assert held == {name if name.startswith("moeserve/") else f"moeserve/v1/{name}": content for name, content in found.items()}


def test_it_is_installed_and_says_which_it_is(bin_folder: Path, tmp_path: Path) -> None:
    assert run(bin_folder / "moeserve", "--version", cwd=tmp_path) == f"moeserve {VERSION}"
    home = Path(run(bin_folder / "python", "-c", "import moeserve.v1.moe_service_pb2; print(moeserve.__file__)", cwd=tmp_path))
    assert bin_folder.parent in home.parents


def test_a_source_tree_says_its_own_version(tmp_path: Path) -> None:
    """Whatever version is installed beside it."""
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "moeserve"\nversion = "7.8.9"\n')
    (tmp_path / "moeserve").symlink_to(REPOSITORY / "moeserve")
    assert run(sys.executable, "-m", "moeserve", "--version", cwd=tmp_path) == "moeserve 7.8.9"
