"""New weights from anything that a path can lead to: a sentence, at once, and the old ones are served on."""

from __future__ import annotations

import json
import logging
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from moeserve import Client, ConfigError, InvalidRequest, MoELayer, MoEServeError
from moeserve.client import AdminClient
from tests.support.checkpoints_on_disk import CONFIG
from tests.support.closeness import assert_close
from tests.support.harness import ServiceHarness
from tests.support.seeded_folders import LAYER, configuration, folder, tokens

ADMIN = "of-the-administrator"


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def a_loop(path: Path) -> None:
    path.symlink_to(path.name)


def a_folder(path: Path) -> None:
    path.mkdir()


def nothing(path: Path) -> None:
    path.symlink_to("nowhere")


def holding(content: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(content)

    return write


SPECIAL = {make.__name__: make for make in (a_pipe, a_device, a_loop, a_folder, nothing)}
NO_JSON = {
    "not text": holding(b"\xff\xfe{}"),
    "not an object": holding(b"[]"),
    "nested": holding(b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "nested tables": holding(json.dumps(CONFIG)[:-1].encode() + b', "text_config": ' + b'{"text_config": ' * 500 + b"{" + b"}" * 502),
    "digits": holding(b'{"hidden_size": ' + b"9" * 5000 + b"}"),
}
NO_TAG = {
    "not text": holding(b"\xff\xfe"),
    "long": holding(b"a" * 300),
    "longer": holding(b"a" * 10**6),
    "no name": holding(b"a\0b"),
    "up": holding(b".."),
}
FILES = {"config.json": SPECIAL | NO_JSON, "model.safetensors": SPECIAL, "model.safetensors.index.json": SPECIAL | NO_JSON}
EXPERT = "layer_0_expert_0_mp_rank_00_model_states.pt"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceHarness]:
    path = tmp_path_factory.mktemp("odd")
    (path / "admin").write_text(ADMIN)
    served = {**configuration(folder(path / "old", 0)), "server": {"port": 0, "admin_token_file": path / "admin"}}
    with ServiceHarness(served, "local", path) as running:
        yield running
        with Client(running.target) as client:
            expected = MoELayer.from_checkpoint(path / "old", dtype=torch.float32)(tokens(0))
            assert_close(client.forward(tokens(0)).hidden_states, expected)


def refusal(service: ServiceHarness, path: str | Path) -> str:
    with AdminClient(service.target, ADMIN) as admin, pytest.raises(MoEServeError) as caught:
        admin.swap(LAYER, path, timeout=30)
    assert isinstance(caught.value, ConfigError | InvalidRequest), caught.value
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "path", ["/" + "a" * 300, "/" + "a/" * 3000, "/a\0b", "/dev/zero", "/etc/passwd", "/etc/passwd/a", "/proc/self/mem", "/dev"]
)
def test_paths_that_lead_to_no_folder(service: ServiceHarness, path: str, caplog: pytest.LogCaptureFixture) -> None:
    assert path[:50].rstrip("/").encode("unicode_escape").decode().split("\\")[0] in refusal(service, path)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.parametrize("make", [make for name, make in SPECIAL.items() if name != "a_folder"], ids=lambda make: make.__name__)
def test_what_is_no_folder(service: ServiceHarness, tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "model")
    assert str(tmp_path / "model") in refusal(service, tmp_path / "model")


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, kinds in FILES.items() for kind in kinds])
def test_files_of_a_folder_that_are_something_else(
    service: ServiceHarness, tmp_path: Path, name: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    whole = folder(tmp_path / "model", 1)
    (whole / name).unlink(missing_ok=True)
    FILES[name][kind](whole / name)
    if name == "model.safetensors.index.json" and kind not in NO_JSON:
        (whole / "model.safetensors").unlink()
    assert str(whole) in refusal(service, whole)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.parametrize("kind", [*NO_TAG, *SPECIAL])
def test_a_tag_that_names_no_folder(service: ServiceHarness, tmp_path: Path, kind: str) -> None:
    (NO_TAG | SPECIAL)[kind](tmp_path / "latest")
    assert str(tmp_path) in refusal(service, tmp_path)


@pytest.mark.parametrize("kind", SPECIAL)
def test_files_of_experts_that_are_something_else(service: ServiceHarness, tmp_path: Path, kind: str) -> None:
    SPECIAL[kind](tmp_path / EXPERT)
    assert str(tmp_path) in refusal(service, tmp_path)


def test_whatever_config_json_says_is_taken_or_refused(service: ServiceHarness, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    chance, whole = random.Random(5), folder(tmp_path / "model", 1)
    values = (None, True, -1, 0, 10**6, 2**40, 10**30, 0.5, float("nan"), "", "a", [], [[]], [1] * 1000, {}, {"a": {"b": 1}})
    with AdminClient(service.target, ADMIN) as admin:
        for _ in range(50):
            changes = {key: chance.choice(values) for key in chance.sample(sorted(CONFIG), chance.choice([1, 1, 2]))}
            (whole / "config.json").write_text(json.dumps({**CONFIG, **changes}))
            try:
                admin.swap(LAYER, whole, [0], timeout=30)
            except ConfigError as error:
                assert str(error)
            else:
                admin.swap(LAYER, service.config.model.checkpoint, timeout=30)
    assert not [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
