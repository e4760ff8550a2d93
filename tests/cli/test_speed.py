"""The command line answers at once: what a verb does not need is not imported.

What is imported is the hard fact. How long it takes is compared, in processor time, with what every program of its kind has to import,
measured here and now.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.harness import ServiceHarness

HEAVY = {"torch", "ray", "numpy", "transformers"}
DEAD = "127.0.0.1:1"
ADMIN = "of the administrator"
MOST_ROUNDS = 5


def python(*arguments: str, **environment: str) -> tuple[float, subprocess.CompletedProcess[str]]:
    """Seconds of processor time that it took, and how it ended."""
    before = os.times()
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, env={**os.environ, **environment})
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system, done


def imported(done: subprocess.CompletedProcess[str]) -> set[str]:
    """Packages, as `-X importtime` tells of them."""
    return {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines() if line.startswith("import time:")}


def said(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What the verb itself has told."""
    return [line for line in done.stderr.splitlines() if not line.startswith("import time:")]


@pytest.fixture(scope="module")
def admin_token(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("admin") / "token"
    file.write_text(ADMIN)
    file.chmod(0o600)
    return file


@pytest.fixture(scope="module")
def service(admin_token: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceHarness]:
    layers = [{"hidden_size": 16, "intermediate_size": 8, "num_experts": 4}]
    config = {"layers": layers, "placement": {"num_hosts": 2}, "server": {"port": 0, "admin_token_file": admin_token}}
    with ServiceHarness(config, "local", tmp_path_factory.mktemp("service")) as service:
        yield service


def test_no_verb_needs_more_than_its_options_to_say_what_it_takes() -> None:
    """All of them in one process: what `--help` of one imports, or completion, is less."""
    code = """import sys, typer
from moeserve.cli.verbs import app
verbs = typer.main.get_command(app).commands
print(*(name for name, verb in verbs.items() if verb.params or verb.commands))
print(*sys.modules)
"""
    _, done = python("-c", code)
    names, modules = done.stdout.splitlines()
    assert {"bench", "config", "drain", "plan", "serve", "status", "top"} <= set(names.split())
    assert not HEAVY & set(modules.split()), done.stderr


@pytest.mark.parametrize("verb", ["status", "scale", "drain", "swap", "rebalance", "events", "shutdown", "top", "ping"])
def test_an_admin_verb_against_nobody(verb: str, admin_token: Path) -> None:
    more = {"scale": ("--hosts", "2"), "drain": ("host-0",), "swap": ("--checkpoint", "/x"), "top": ("--once",)}.get(verb, ())
    token = () if verb in ("top", "ping") else ("--admin-token-file", str(admin_token))
    _, done = python("-X", "importtime", "-m", "moeserve", verb, DEAD, *more, *token)
    assert done.returncode == 3 and len(said(done)) == 1 and said(done)[0].startswith(f"error: {DEAD} is unavailable")
    assert "grpc" in imported(done) and not HEAVY & imported(done)


ANSWERS = {
    ("top", "--once"): "host-1",
    ("ping",): "ready",
    ("status",): "2 of 2 hosts up",
    ("scale", "--hosts", "2"): "host-0, host-1",
    ("rebalance", "--dry-run"): "nothing would move",
    ("events",): "start 2 hosts (the service starts): done in",
}


@pytest.mark.parametrize(("verb", "told"), ANSWERS.items())
def test_an_admin_verb_against_a_service(service: ServiceHarness, admin_token: Path, verb: tuple[str, ...], told: str) -> None:
    token = () if verb[0] in ("top", "ping") else ("--admin-token-file", str(admin_token))
    _, done = python("-X", "importtime", "-m", "moeserve", verb[0], service.target, *verb[1:], *token)
    assert done.returncode == 0 and told in done.stdout and said(done) == []
    assert not HEAVY & imported(done)


def test_serve_says_at_once_that_it_starts(tmp_path: Path) -> None:
    """And what is wrong with a configuration, before it imports what it serves with."""
    (tmp_path / "service.toml").write_text("[servr]\n")
    _, done = python("-X", "importtime", "-m", "moeserve", "serve", str(tmp_path / "service.toml"))
    assert done.returncode == 2 and not HEAVY & imported(done)
    first, error = said(done)
    assert re.fullmatch(rf"starting moeserve \S+, reading {tmp_path}/service.toml", first) and "servr is not a key" in error


def test_the_python_client_asks_for_counts_without_torch(service: ServiceHarness) -> None:
    code = """import sys, moeserve
from moeserve.client.admin import AdminClient
from moeserve.observe.summary import as_json
with moeserve.Client(sys.argv[1]) as client:
    stats, layers = client.stats(), client.layers()
    as_json(stats)
print("torch" in sys.modules, layers[0].dtype, stats.layers[0].processed.dtype, stats.layers[0].processed.tolist())
"""
    _, done = python("-c", code, service.target)
    assert done.stdout == "False float32 torch.int64 [0, 0, 0, 0]\n", done.stderr


def test_how_long_it_takes(tmp_path: Path, admin_token: Path) -> None:
    """Interleaved, the best of several rounds: other work on this machine disturbs the one or the other."""
    (tmp_path / "service.toml").write_text("[[layers]]\nhidden_size = 16\nintermediate_size = 8\nnum_experts = 4\n")
    commands = {
        "typer": ("-c", "import typer"),
        "grpc": ("-c", "import grpc"),
        "help": ("-m", "moeserve", "--help"),
        "version": ("-m", "moeserve", "--version"),
        "serve": ("-m", "moeserve", "serve", str(tmp_path / "none.toml")),
        "status": ("-m", "moeserve", "status", DEAD, "--admin-token-file", str(admin_token)),
        "torch": ("-c", "import torch"),
        "check": ("-m", "moeserve", "config", "check", str(tmp_path / "service.toml")),
    }
    took = dict.fromkeys(commands, float("inf"))
    for _ in range(MOST_ROUNDS):
        took = {name: min(took[name], python(*command)[0]) for name, command in commands.items()}
        if all(quickness(took).values()):
            return
    raise AssertionError((quickness(took), took))


def quickness(took: dict[str, float]) -> dict[str, bool]:
    """What answers at once, by seconds of processor time."""
    return {
        "help": max(took["help"], took["version"]) < 4 * took["typer"],
        "status": max(took["serve"], took["status"]) < took["typer"] + 4 * took["grpc"],
        "check": took["check"] < 1.7 * took["torch"],
    }
