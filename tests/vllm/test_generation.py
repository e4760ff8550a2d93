"""vLLM with its experts in a service against vLLM with its own: `make test-vllm`, or any Python with vLLM in MOESERVE_VLLM_PYTHON."""

from __future__ import annotations

import json
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from moeserve import Client
from tests.support.harness import ServiceHarness
from tests.support.waiting import until
from tests.vllm.environment import PYTHON, environment, needs_vllm
from tests.vllm.models import FAMILIES, save

pytestmark = [pytest.mark.slow, needs_vllm]
HERE = Path(__file__).parent
NEW = 24
PROMPTS = [[3 + (7 * start + 5 * place) % 120 for place in range(length)] for start, length in enumerate((3, 17, 40, 9))]
#: rows that pass a layer: the last token of a sequence is not computed
ROWS = sum(map(len, PROMPTS)) + len(PROMPTS) * (NEW - 1)


@dataclass(frozen=True)
class Generated:
    """What tests/vllm/engine.py prints."""

    tokens: list[list[int]]
    reasons: list[str]
    again: list[list[int]]
    seconds: float
    parameters: dict[str, int]
    read: list[str]


def generate(model: Path, target: str | None = None, **asked: Any) -> Generated:
    options = {} if target is None else {"additional_config": {"moeserve": {"target": target, **asked.pop("settings", {})}}}
    job = {"model": str(model), "prompts": PROMPTS, "new": NEW, "options": options | asked.pop("options", {}), **asked}
    done = subprocess.run(
        [PYTHON, HERE / "engine.py", json.dumps(job)], env=environment(), capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    return Generated(**json.loads(done.stdout.splitlines()[-1]))


def served(model: Path, folder: Path, **tables: Any) -> ServiceHarness:
    config = {"model": {"checkpoint": model, "dtype": "float32"}, "placement": {"num_hosts": 2}, **tables}
    return ServiceHarness(config, "shm", folder)


def of_experts(names: Any) -> list[str]:
    return [name for name in names if ".experts." in name]


@pytest.mark.parametrize("family", ["tiny-moe", *FAMILIES])
def test_tokens_are_those_of_local_experts(family: str, tiny_moe: Path, tmp_path: Path) -> None:
    """Several sequences at once; prompts and tokens are counted, and nothing that vLLM measures itself with."""
    model, top_k, num_layers = tiny_moe, 2, 4
    if family != "tiny-moe":
        model, (_, top_k, num_layers) = tmp_path / "model", FAMILIES[family]
        save(family, model)
    local = generate(model)
    with served(model, tmp_path) as service, Client(service.target) as client:
        remote = generate(model, service.target)
        layers = client.stats().layers
    assert remote.tokens == local.tokens and len({tuple(each) for each in local.tokens}) > 1
    assert [(layer.tokens, int(layer.processed.sum())) for layer in layers] == [(ROWS, ROWS * top_k)] * num_layers
    assert of_experts(local.parameters) and of_experts(local.read)
    assert not of_experts(remote.parameters) and not of_experts(remote.read)
    assert set(remote.read) == set(local.read) - set(of_experts(local.read))
    held = sum(local.parameters.values()) - sum(local.parameters[name] for name in of_experts(local.parameters))
    assert sum(remote.parameters.values()) == held


def test_a_compiled_model_calls_as_well(tmp_path: Path) -> None:
    model = tmp_path / "model"
    save("qwen3_moe", model)
    local = generate(model)
    with served(model, tmp_path) as service, Client(service.target) as client:
        compiled = generate(model, service.target, options={"enforce_eager": False})
        assert client.stats().layers[0].tokens == ROWS
    assert compiled.tokens == local.tokens


def test_a_host_that_is_killed_while_vllm_generates(tiny_moe: Path, tmp_path: Path) -> None:
    local = generate(tiny_moe)
    with served(tiny_moe, tmp_path, placement={"num_hosts": 2, "copies": 2}) as service, Client(service.target) as client:
        seen = threading.Event()

        def kill() -> None:
            until(lambda: client.stats().layers[3].tokens >= ROWS // 2, 240)
            service.hosts[0].kill()
            seen.set()

        killer = threading.Thread(target=kill)
        killer.start()
        remote = generate(tiny_moe, service.target)
        killer.join()
        assert seen.is_set() and client.stats().layers[3].tokens == ROWS
    assert remote.tokens == local.tokens


@pytest.mark.parametrize(
    ("settings", "options", "sentence"),
    [
        ({"hosts": 2}, {}, "'hosts' is not a key; allowed: target, model"),
        ({"target": "127.0.0.1:1"}, {}, "127.0.0.1:1 is unavailable"),
    ],
)
def test_what_cannot_be_is_said_before_the_engine_starts(
    settings: dict[str, Any], options: dict[str, Any], sentence: str, tiny_moe: Path
) -> None:
    with pytest.raises(AssertionError, match=sentence):
        generate(tiny_moe, "127.0.0.1:1", settings=settings, options=options)
