"""New weights while requests run: none fails, and each is answered with the weights its answer names."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moeserve import CheckpointError, Client, ConfigError, ForwardOutput, MoELayer, UnknownLayer
from moeserve.checkpoints.huggingface import HuggingFaceLayer
from moeserve.gating import Router
from tests.support.checkpoints_on_disk import CONFIG, MLP, write_folder
from tests.support.closeness import assert_close
from tests.support.followers import ThreadedFrontend
from tests.support.harness import CHANNELS, Kind, ServiceHarness
from tests.support.seeded_folders import LAYER, configuration, folder, tokens
from tests.support.seen import epochs
from tests.support.waiting import until_async


@pytest.mark.parametrize("kind", CHANNELS)
def test_under_load_no_request_fails_and_none_is_a_mix(kind: Kind, tmp_path: Path) -> None:
    folders = [folder(tmp_path / str(seed), seed) for seed in range(4)]
    references = [MoELayer.from_checkpoint(path, dtype=torch.float32) for path in folders]
    with ServiceHarness(configuration(folders[0]), kind, tmp_path) as service:
        stop, answered = threading.Event(), threading.Semaphore(0)

        def caller(number: int) -> list[tuple[int, ForwardOutput]]:
            answers: list[tuple[int, ForwardOutput]] = []
            with Client(service.target) as client:
                while not stop.is_set():
                    seed = 1000 * number + len(answers)
                    answers.append((seed, client.forward(tokens(seed))))
                    answered.release()
            return answers

        def go_on() -> None:
            """All of them, from now on."""
            while answered.acquire(blocking=False):
                pass
            for _ in range(20):
                assert answered.acquire(timeout=30)

        with ThreadPoolExecutor(4) as pool:
            running = [pool.submit(caller, number) for number in range(4)]
            for path in folders[1:]:
                go_on()
                service.call(service.controller.swap(LAYER, path))
            go_on()
            stop.set()
            answers = [answer for future in running for answer in future.result()]
    assert {answer.model_revision for _, answer in answers} == {1, 2, 3, 4}
    for seed, answer in answers:
        assert_close(answer.hidden_states, references[answer.model_revision - 1](tokens(seed)))


def test_one_expert_is_new_and_a_host_that_comes_back_has_it(tmp_path: Path) -> None:
    old, new = folder(tmp_path / "old", 0), folder(tmp_path / "new", 1)
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    tensors = [{name: tensor.clone() for name, tensor in load_file(path / "model.safetensors").items()} for path in (old, new)]
    write_folder(mixed, CONFIG, tensors[0] | {name: value for name, value in tensors[1].items() if f"{MLP}.experts.2." in name})
    expected = MoELayer.from_checkpoint(mixed, dtype=torch.float32)(tokens(0))
    with ServiceHarness(configuration(old), "local", tmp_path) as service, Client(service.target) as client:
        assert client.forward(tokens(0)).model_revision == 1
        release = service.call(service.controller.swap(LAYER, new, [2]))
        answer = client.forward(tokens(0))
        assert (release.epoch, answer.model_revision, client.stats().epoch) == (2, 2, 2)
        assert_close(answer.hidden_states, expected)
        for host in service.hosts:
            host.stop()
            host.start()
        assert_close(client.forward(tokens(0)).hidden_states, expected)


def test_what_cannot_be_leaves_everything_as_it_was(tmp_path: Path) -> None:
    old, new = folder(tmp_path / "old", 0), folder(tmp_path / "new", 1)
    broken = folder(tmp_path / "broken", 2)
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:-100])
    with ServiceHarness(configuration(old), "local", tmp_path) as service, Client(service.target) as client:
        before = client.forward(tokens(0))
        for refused, layer, path, experts in (
            (UnknownLayer, "model.layers.9.mlp", new, None),
            (ConfigError, LAYER, new, [4]),
            (ConfigError, LAYER, tmp_path / "nowhere", None),
            (CheckpointError, LAYER, broken, None),
        ):
            with pytest.raises(refused):
                service.call(service.controller.swap(layer, path, experts))
            after = client.forward(tokens(0))
            assert after.model_revision == 1
            assert_close(after.hidden_states, before.hidden_states)
        service.call(service.controller.swap(LAYER, new, [1]))
        assert client.forward(tokens(0)).model_revision == 2


@pytest.mark.parametrize("factor", [1e25, 1e3], ids=["overflowing", "implausible"])
def test_weights_that_cannot_be_meant_are_refused(factor: float, tmp_path: Path) -> None:
    """A canary compares what new experts make of its rows with what those in use do."""
    old, new = folder(tmp_path / "old", 0), folder(tmp_path / "new", 1)
    tensors = load_file(new / "model.safetensors")
    broken = {name: tensor * factor if f"{MLP}.experts.2." in name else tensor for name, tensor in tensors.items()}
    (tmp_path / "broken").mkdir()
    write_folder(tmp_path / "broken", CONFIG, broken)
    with ServiceHarness(configuration(old), "local", tmp_path) as service, Client(service.target) as client:
        before = client.forward(tokens(0))
        service.call(until_async(lambda: epochs(service) == [1]))
        with pytest.raises(ConfigError, match=r"experts? \[?2\]? of layer"):
            service.call(service.controller.swap(LAYER, tmp_path / "broken"))
        after = client.forward(tokens(0))
        assert (after.model_revision, after.hidden_states.tolist()) == (1, before.hidden_states.tolist())
        service.call(service.controller.swap(LAYER, new))
        assert client.forward(tokens(0)).model_revision == 2


@pytest.mark.parametrize("factor", [1e25, 1e6], ids=["overflowing", "implausible"])
def test_a_shared_expert_that_cannot_be_meant_is_refused(factor: float, tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    layer: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 8, "num_experts": 4, "shared_expert": {"intermediate_size": 8}}
    for seed, path in enumerate((old, new)):
        MoELayer(**layer, seed=seed).save(path)
    (weights,) = new.glob("*.safetensors")
    sound = load_file(weights)
    save_file({name: tensor * factor if "shared_expert" in name else tensor for name, tensor in sound.items()}, weights)
    config = {"model": {"checkpoint": old}, "placement": {"num_hosts": 2}}
    with ServiceHarness(config, "local", tmp_path) as service, Client(service.target) as client:
        service.call(until_async(lambda: epochs(service) == [1]))
        with pytest.raises(ConfigError, match="the shared expert of layer"):
            service.call(service.controller.swap("layers.0", new))
        assert client.forward(torch.ones(1, 16)).model_revision == 1
        save_file(sound, weights)
        service.call(service.controller.swap("layers.0", new))
        assert client.forward(torch.ones(1, 16)).model_revision == 2


def test_a_caller_who_hangs_up_leaves_nothing_half_made(tmp_path: Path) -> None:
    """The change goes on to its end; the next one begins from there."""
    old, new, newest = (folder(tmp_path / name, seed) for seed, name in enumerate(("old", "new", "newest")))
    with ServiceHarness(configuration(old), "local", tmp_path) as service, Client(service.target) as client:

        async def hang_up() -> None:
            asking = asyncio.ensure_future(service.controller.swap(LAYER, new))
            await asyncio.sleep(0)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking

        service.call(hang_up())
        service.call(service.controller.swap(LAYER, newest, [2]))
        answer = client.forward(tokens(0))
        assert answer.model_revision == 3
        mixed = tmp_path / "mixed"
        mixed.mkdir()
        base, added = (load_file(path / "model.safetensors") for path in (new, newest))
        write_folder(mixed, CONFIG, base | {name: value for name, value in added.items() if f"{MLP}.experts.2." in name})
        assert_close(answer.hidden_states, MoELayer.from_checkpoint(mixed, dtype=torch.float32)(tokens(0)))


def test_a_change_that_fails_on_a_host_does_not_show_in_the_next_one(tmp_path: Path) -> None:
    """One host has the failed release already when another refuses it; what comes next must not be built on that."""
    old, new = folder(tmp_path / "old", 0), folder(tmp_path / "new", 1)
    with ServiceHarness(configuration(old), "local", tmp_path) as service, Client(service.target) as client:
        before = client.forward(tokens(0)).hidden_states
        take = service.hosts[1].host.holdings.take

        def fail(_: object) -> None:
            raise RuntimeError("no error of ours")

        service.hosts[1].host.holdings.take = fail  # type: ignore[method-assign]
        with pytest.raises(RuntimeError):
            service.call(service.controller.swap(LAYER, new))
        service.hosts[1].host.holdings.take = take  # type: ignore[method-assign]
        assert_close(client.forward(tokens(0)).hidden_states, before)
        service.call(service.controller.swap(LAYER, old))
        answer = client.forward(tokens(0))
        assert answer.model_revision == 2
        assert_close(answer.hidden_states, before)


def test_a_gate_is_read_once_and_requests_are_answered_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the frontend here and by one that follows; and not at all when only places change."""
    old, new = folder(tmp_path / "old", 0), folder(tmp_path / "new", 1)
    begun, leave, router = threading.Semaphore(0), threading.Event(), HuggingFaceLayer.router
    with ServiceHarness(configuration(old), "shm", tmp_path) as service, ThreadPoolExecutor() as pool, ExitStack() as stack:
        service.call(service.open_control())
        follower = stack.enter_context(ThreadedFrontend(service.control_target))
        clients = [stack.enter_context(Client(target)) for target in (service.target, follower.target)]
        before = clients[0].forward(tokens(0)).hidden_states
        reads = []

        def slow(layer: HuggingFaceLayer) -> Router:
            reads.append(layer.files.folder)
            begun.release()
            assert leave.wait(60)
            return router(layer)

        monkeypatch.setattr(HuggingFaceLayer, "router", slow)
        swapping = pool.submit(service.call, service.controller.swap(LAYER, new))
        try:
            for _ in clients:
                assert begun.acquire(timeout=30)
            for client in clients:
                assert_close(client.forward(tokens(0), timeout=20).hidden_states, before)
        finally:
            leave.set()
        assert swapping.result(timeout=30).epoch == 2
        assert reads == [new, new]
        service.call(service.controller.scale(3))
        service.call(service.controller.swap(LAYER, old, [1]))
        assert reads == [new, new]
        for client in clients:
            assert client.forward(tokens(0)).model_revision == 3
