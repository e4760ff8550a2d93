"""Files of the served checkpoint are replaced by others: nobody takes weights from them until somebody says so, and no answer is a mix."""

from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from moeserve import Client, MoELayer
from moeserve.errors import CheckpointChanged, ConfigError
from tests.support.closeness import assert_close
from tests.support.followers import ThreadedFrontend
from tests.support.harness import ServiceHarness
from tests.support.seeded_folders import LAYER, configuration, folder, replaced, tokens
from tests.support.seen import gone
from tests.support.waiting import until_async


def answer_of(path: Path) -> torch.Tensor:
    return MoELayer.from_checkpoint(path, dtype=torch.float32)(tokens(0))


def restart(service: ServiceHarness, number: int) -> None:
    service.hosts[number].stop()
    service.call(gone(service, number))
    with suppress(CheckpointChanged):
        service.hosts[number].start()


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path, Path]:
    """What is served; the same, kept; and other weights of the same sizes."""
    served, new = folder(tmp_path / "served", 0), folder(tmp_path / "new", 1)
    return served, Path(shutil.copytree(served, tmp_path / "kept")), new


def test_a_copy_that_has_the_old_weights_serves_on(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    served, kept, new = folders
    old = answer_of(served)
    config = {**configuration(served), "placement": {"num_hosts": 2, "copies": 2}}
    with ServiceHarness(config, "shm", tmp_path) as service, Client(service.target) as client:
        replaced(served, new)
        restart(service, 0)
        with pytest.raises(CheckpointChanged, match=rf"the numbers in {served}/model\.safetensors are others; .* moeserve swap TARGET"):
            service.call(service.find(0))
        for _ in range(3):
            answer = client.forward(tokens(0))
            assert answer.model_revision == 1
            assert_close(answer.hidden_states, old)
        replaced(served, kept)
        service.call(until_async(lambda: service.frontend.stats().hosts[0].up))
        assert_close(client.forward(tokens(0)).hidden_states, old)


def test_nobody_else_takes_them_and_a_swap_does(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    served, _, new = folders
    old, changed = answer_of(served), answer_of(new)
    with ServiceHarness(configuration(served), "shm", tmp_path) as service, Client(service.target) as client:
        service.call(service.open_control())
        replaced(served, new)
        for change in (service.controller.scale(3), service.controller.scale(1), service.controller.drain("host-0")):
            with pytest.raises(CheckpointChanged, match=r"the numbers in .* are others"):
                service.call(change)
        with pytest.raises(ConfigError, match=r"the numbers in .* are others"), ThreadedFrontend(service.control_target):
            pass
        assert_close(client.forward(tokens(0)).hidden_states, old)
        assert len(service.hosts) == 2

        restart(service, 0)
        with pytest.raises(CheckpointChanged):
            service.call(service.find(0))
        assert service.call(service.controller.swap("", served)).revision(LAYER) == 2
        with ThreadedFrontend(service.control_target) as follower, Client(follower.target) as other:
            for caller in (client, other):
                answer = caller.forward(tokens(0))
                assert answer.model_revision == 2
                assert_close(answer.hidden_states, changed)
        restart(service, 1)
        service.call(service.controller.scale(3))
        assert_close(client.forward(tokens(0)).hidden_states, changed)


def test_files_of_a_swap_may_change_too(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """A host that has experts of them refuses them, one that has none does not care."""
    served, _, new = folders
    with ServiceHarness(configuration(served), "local", tmp_path) as service, Client(service.target) as client:
        service.call(service.controller.swap(LAYER, new, [0]))
        before = client.forward(tokens(0)).hidden_states
        replaced(new, served)
        for number in (1, 0):
            restart(service, number)
            if number == 1:
                assert_close(client.forward(tokens(0)).hidden_states, before)
        with pytest.raises(
            CheckpointChanged, match=rf"{new}/model\.safetensors are others; .* --layer {LAYER} --experts 0 --checkpoint {new}"
        ):
            service.call(service.find(0))
        assert service.call(service.controller.swap(LAYER, new, [0])).revision(LAYER) == 3
        assert_close(client.forward(tokens(0)).hidden_states, answer_of(served))


@pytest.mark.parametrize("change", ["touched", "copied", "rewritten"])
def test_the_same_content_is_not_refused(change: str, folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    served, kept, _ = folders
    with ServiceHarness(configuration(served), "local", tmp_path) as service, Client(service.target) as client:
        before = client.forward(tokens(0)).hidden_states
        if change == "touched":
            for file in served.iterdir():
                os.utime(file, (0, 0))
        elif change == "copied":
            replaced(served, kept)
        else:
            for file in served.iterdir():
                file.write_bytes(file.read_bytes())
        restart(service, 0)
        service.call(service.controller.scale(3))
        assert_close(client.forward(tokens(0)).hidden_states, before)


def test_a_swap_under_way_when_the_files_change_again_is_refused(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """Between the controller, which looks first, and a host, which loads."""
    served, kept, new = folders
    with ServiceHarness(configuration(served), "local", tmp_path) as service, Client(service.target) as client, ThreadPoolExecutor():
        before = client.forward(tokens(0)).hidden_states
        take = service.hosts[0].host.holdings.take

        def late(release: object) -> None:
            replaced(new, kept)
            take(release)  # type: ignore[arg-type]

        service.hosts[0].host.holdings.take = late  # type: ignore[method-assign]
        with pytest.raises(CheckpointChanged):
            service.call(service.controller.swap(LAYER, new))
        answer = client.forward(tokens(0))
        assert answer.model_revision == 1
        assert_close(answer.hidden_states, before)


def test_other_sizes_and_other_keys_are_not_taken_either(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    served, kept, _ = folders
    with ServiceHarness(configuration(served), "local", tmp_path) as service:
        described = json.loads((served / "config.json").read_text())
        (served / "config.json").write_text(json.dumps({**described, "norm_topk_prob": True}))
        with pytest.raises(CheckpointChanged, match=r"config\.json has .* bytes and had"):
            service.call(service.controller.scale(3))
        replaced(served, kept)
        (served / "model.safetensors").write_bytes((served / "model.safetensors").read_bytes()[:-8])
        with pytest.raises(CheckpointChanged, match=r"model\.safetensors is not a complete safetensors file"):
            service.call(service.controller.scale(3))
        (served / "model.safetensors").unlink()
        with pytest.raises(CheckpointChanged, match=r"model\.safetensors cannot be read: No such file"):
            service.call(service.controller.scale(3))
        replaced(served, kept)
        assert service.call(service.controller.scale(3)).epoch > 1
