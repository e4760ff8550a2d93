"""vLLM with its experts in a service against vLLM with its own: `make test-vllm`, or any Python with vLLM in MOESERVE_VLLM_PYTHON."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from moeserve import Client
from tests.support.harness import received
from tests.support.waiting import until
from tests.vllm.environment import PYTHON, REPOSITORY, environment, needs_vllm
from tests.vllm.jobs import NEW, ROWS, Generated, generate, job, served
from tests.vllm.models import FAMILIES, save

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200), needs_vllm]


def of_experts(names: Any) -> list[str]:
    return [name for name in names if ".experts." in name]


@dataclass(frozen=True)
class Compared:
    """A model with its own experts, and with those of a service, over gRPC and by a frontend in vLLM's process; a client of the service."""

    local: Generated
    far: Generated
    near: Generated
    client: Client


@pytest.fixture(scope="module")
def compared(tiny_moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Compared]]:
    folder = tmp_path_factory.mktemp("models")
    models = {"tiny-moe": tiny_moe, **{family: folder / family for family in FAMILIES}}
    for family in FAMILIES:
        save(family, models[family])
    with ExitStack() as stack:
        clients, jobs = [], []
        for model in models.values():
            service = stack.enter_context(served(model, tmp_path_factory.mktemp("service")))
            clients.append(stack.enter_context(Client(service.target)))
            jobs += [job(model), job(model, service.target, embedded=False), job(model, service.target)]
        results = generate(*jobs)
        sides = zip(results[::3], results[1::3], results[2::3], clients, strict=True)
        yield {family: Compared(*each) for family, each in zip(models, sides, strict=True)}


@pytest.mark.parametrize("family", ["tiny-moe", *FAMILIES])
def test_tokens_are_those_of_local_experts(family: str, compared: dict[str, Compared]) -> None:
    """Several sequences at once; prompts and tokens are counted, and nothing that vLLM measures itself with."""
    local, client = compared[family].local, compared[family].client
    top_k, num_layers = (2, 4) if family == "tiny-moe" else FAMILIES[family][1:]
    assert not local.error and len({tuple(each) for each in local.tokens}) > 1
    assert of_experts(local.parameters) and of_experts(local.read)
    for remote in (compared[family].far, compared[family].near):
        assert not remote.error and remote.tokens == local.tokens
        assert set(remote.read) == set(local.read) - set(of_experts(local.read))
        assert remote.parameters == {name: size for name, size in local.parameters.items() if name not in of_experts(local.parameters)}
    until(lambda: client.stats().layers[-1].tokens >= 2 * ROWS)
    counts = [(layer.tokens, int(layer.processed.sum())) for layer in client.stats().layers]
    assert counts == [(2 * ROWS, 2 * ROWS * top_k)] * num_layers


def test_a_compiled_model_and_hosts_that_are_killed_while_it_generates(tiny_moe: Path, tmp_path: Path) -> None:
    with served(tiny_moe, tmp_path, placement={"num_hosts": 2, "copies": 2}) as service, Client(service.target) as client:

        def tokens() -> int:
            return client.stats().layers[3].tokens

        def kill() -> None:
            until(lambda: tokens() >= ROWS + ROWS // 2, 1200)
            service.hosts[0].kill()
            until(lambda: tokens() == 2 * ROWS, 1200)
            before = received(service.hosts[1])
            until(lambda: received(service.hosts[1]) >= before + NEW, 1200)
            service.hosts[1].kill()

        with ThreadPoolExecutor(1) as pool:
            killed = pool.submit(kill)
            compiled = job(tiny_moe, service.target, enforce_eager=False)
            far, near = job(tiny_moe, service.target, embedded=False), job(tiny_moe, service.target)
            local, *remote = generate(job(tiny_moe), compiled, far, near)
            killed.result()
        until(lambda: tokens() >= 3 * ROWS)
        assert tokens() == 3 * ROWS
    assert [each.tokens for each in remote] == [local.tokens] * 3


def test_what_cannot_be_is_said_before_the_engine_starts(tiny_moe: Path) -> None:
    wrong = {"target": "127.0.0.1:1", "hosts": 2}, {"target": "127.0.0.1:1"}
    unknown, unreachable = generate(*(job(tiny_moe, additional_config={"moeserve": settings}) for settings in wrong))
    assert "'hosts' is not a key; allowed: target, model" in unknown.error
    assert "127.0.0.1:1 is unavailable" in unreachable.error


def test_pip_changes_nothing_of_what_is_installed_beside_vllm() -> None:
    command = [PYTHON, "-m", "pip", "install", "--dry-run", "--no-build-isolation", "--report", "-", "--quiet", REPOSITORY]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    assert [each["metadata"]["name"] for each in json.loads(done.stdout)["install"]] == ["moeserve"]
