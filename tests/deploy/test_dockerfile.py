"""The recipe of the image, as far as it can be read; test_image.py runs what comes of it."""

from __future__ import annotations

import re

from moeserve.config import ServerConfig
from tests.deploy.dockerfile import given, instructions
from tests.deploy.files import DEPLOY, REPOSITORY


def test_any_builder_can_build_it() -> None:
    """What only BuildKit knows: mounts, heredocs, links, modes, other front ends."""
    text = (DEPLOY / "Dockerfile").read_text()
    assert not re.search(r"^#\s*(syntax|check|escape)=", text, re.M)
    assert not re.search(r"^(RUN|COPY|ADD) --(?!from=)", text, re.M)
    assert "<<" not in text
    assert {name for name, _ in instructions()} <= {
        *("ARG", "FROM", "ENV", "WORKDIR", "COPY", "RUN", "USER", "EXPOSE", "ENTRYPOINT", "CMD"),
    }


def test_every_stage_is_on_the_base_that_was_asked_for() -> None:
    assert instructions()[0] == ("ARG", "BASE_IMAGE=python:3.11-slim")
    assert {stage.split(" AS ")[0] for stage in given("FROM")} == {"${BASE_IMAGE}"}


def test_it_runs_as_a_number_that_is_not_root() -> None:
    (user,) = given("USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)
    names = [name for name, _ in instructions()]
    assert "RUN" not in names[names.index("USER") :] and "COPY" not in names[names.index("USER") :]


def test_versions_are_the_pinned_ones() -> None:
    installs = [step for run in given("RUN") for step in run.split("&&") if re.search(r"pip (install|wheel|download)", step)]
    assert len(installs) == 3
    for step in installs:
        assert "--constraint constraints.txt" in step or "--no-deps" in step, step


def test_where_pip_looks_is_forgotten_with_the_first_stage() -> None:
    """Build arguments of the last stage can be read in the history of an image."""
    names = [f"{name} {rest}" for name, rest in instructions()]
    last = max(index for index, line in enumerate(names) if line.startswith("FROM"))
    assert {line for line in names[:last] if line.startswith("ARG PIP_")}
    assert not [line for line in names[last:] if line.startswith("ARG")]


def test_what_is_copied_is_let_through_and_exists() -> None:
    allowed = {line[1:] for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {source for line in given("COPY") if "--from" not in line for source in line.split()[:-1]}
    assert copied == allowed
    assert all((REPOSITORY / source).exists() for source in copied)


def test_ports_are_those_of_the_code() -> None:
    server = ServerConfig()
    assert given("EXPOSE") == [f"{server.port} {server.metrics_port}"]
