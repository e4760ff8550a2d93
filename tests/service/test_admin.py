"""Who may change what is served, and how: over gRPC and from the shell."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moeserve import Client, ConfigError, InvalidRequest, MoELayer, MoEServeError, Unauthenticated, UnknownLayer
from moeserve.cli.app import main
from moeserve.client import AdminClient
from tests.support.closeness import assert_close
from tests.support.harness import ServiceHarness
from tests.support.seeded_folders import LAYER, configuration, folder, tokens

ADMIN, CALLER = "of the administrator", "of callers"


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    return folder(tmp_path / "old", 0), folder(tmp_path / "new", 1)


@pytest.fixture
def service(tmp_path: Path, folders: tuple[Path, Path]) -> Iterator[ServiceHarness]:
    (tmp_path / "admin").write_text(ADMIN)
    (tmp_path / "caller").write_text(CALLER)
    server = {"admin_token_file": tmp_path / "admin", "auth_token_file": tmp_path / "caller"}
    with ServiceHarness({**configuration(folders[0]), "server": {"port": 0, **server}}, "local", tmp_path) as running:
        yield running


def test_the_admin_swaps_and_callers_see_the_revision(service: ServiceHarness, folders: tuple[Path, Path]) -> None:
    with AdminClient(service.target, ADMIN) as admin, Client(service.target, token=CALLER) as client:
        done = admin.swap(LAYER, folders[1])
        assert (done.epoch, done.model_revision) == (2, 2)
        answer = client.forward(tokens(0))
        assert answer.model_revision == 2
        assert_close(answer.hidden_states, MoELayer.from_checkpoint(folders[1], dtype=torch.float32)(tokens(0)))
        assert client.forward(tokens(0)[:0]).model_revision == 2


@pytest.mark.parametrize("wrong", [CALLER, "", "secret"])
def test_nobody_else_does(service: ServiceHarness, folders: tuple[Path, Path], wrong: str) -> None:
    with AdminClient(service.target, wrong) as admin, pytest.raises(Unauthenticated, match="admin token is missing or wrong"):
        admin.swap(LAYER, folders[1])
    with Client(service.target, token=ADMIN) as client, pytest.raises(Unauthenticated):
        client.forward(tokens(0))


def test_what_the_service_refuses_is_raised_by_the_client(service: ServiceHarness, folders: tuple[Path, Path]) -> None:
    with AdminClient(service.target, ADMIN) as admin:
        with pytest.raises(UnknownLayer, match=r"there is no layer 'a'; served: model\.layers\.0\.mlp"):
            admin.swap("a", folders[1])
        with pytest.raises(InvalidRequest, match="allowed: the absolute path of a folder"):
            admin.swap(LAYER, "new")
        with pytest.raises(ConfigError, match="/nowhere does not exist"):
            admin.swap(LAYER, "/nowhere")


def test_without_an_admin_token_there_is_no_such_service(tmp_path: Path, folders: tuple[Path, Path]) -> None:
    with (
        ServiceHarness(configuration(folders[0]), "local", tmp_path) as service,
        AdminClient(service.target, "any") as admin,
        pytest.raises(MoEServeError, match=r"[Mm]ethod not found"),
    ):
        admin.swap(LAYER, folders[1])


def test_from_the_shell(service: ServiceHarness, folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["swap", service.target, "--layer", LAYER, "--checkpoint", str(folders[1]), "--admin-token-file", str(tmp_path / "admin")]
    assert main([*command, "--experts", "1, 3"]) == 0
    assert capsys.readouterr().out == f"layer {LAYER} has revision 2 since epoch 2\n"
    assert main([*command, "--experts", "one"]) == 2
    assert "'one' is not the number of an expert" in capsys.readouterr().err
    assert main([*command, "--experts", "7"]) != 0
    assert "has no expert 7; it has 0..3" in capsys.readouterr().err
    assert main([*command[:5], str(tmp_path / "nowhere"), *command[6:]]) == 2
    assert "nowhere does not exist" in capsys.readouterr().err


def test_scaling_and_draining(service: ServiceHarness, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with AdminClient(service.target, ADMIN) as admin:
        placed = admin.scale(3)
        assert (placed.epoch, placed.hosts) == (2, ("host-0", "host-1", "host-2"))
        placed = admin.drain("host-1")
        assert (placed.epoch, placed.hosts) == (3, ("host-0", "host-2"))
        with pytest.raises(MoEServeError, match="there is no host 'host-1'; there are host-0, host-2"):
            admin.drain("host-1")
    token = ["--admin-token-file", str(tmp_path / "admin")]
    assert main(["scale", service.target, "--hosts", "1", *token]) == 0
    assert capsys.readouterr().out == "epoch 4: the experts are on host-0\n"
    assert main(["drain", service.target, "host-0", *token]) != 0
    assert "host-0 is the only host; a service needs at least one" in capsys.readouterr().err
    assert main(["scale", service.target, "--hosts", "0", *token]) == 2


def test_shutdown(service: ServiceHarness, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shutdown", service.target, "--admin-token-file", str(tmp_path / "caller")]) != 0
    assert not service.controller.stop_requested.is_set()
    assert main(["shutdown", service.target, "--admin-token-file", str(tmp_path / "admin")]) == 0
    assert service.controller.stop_requested.is_set()
    assert capsys.readouterr().out == f"{service.target} is draining\n"


def test_a_layer_is_named_by_its_position_too(service: ServiceHarness, folders: tuple[Path, Path], tmp_path: Path) -> None:
    with AdminClient(service.target, ADMIN) as admin:
        assert admin.swap(0, folders[1]).model_revision == 2
        command = ["swap", service.target, "--checkpoint", str(folders[1]), "--admin-token-file", str(tmp_path / "admin")]
        assert main([*command, "--layer", "0", "--experts", "1"]) == 0
        assert admin.swap(LAYER, folders[0]).model_revision == 4
        with pytest.raises(UnknownLayer, match=r"there is no layer 1; served: 0\.\.0"):
            admin.swap(1, folders[1])
        with pytest.raises(InvalidRequest, match="layer must be a position or a name, got bool"):
            admin.swap(False, folders[1])
