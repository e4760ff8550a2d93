"""Ranks of vLLM that share a model, or have one each: `make test-vllm`."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from moeserve import Client
from tests.support.waiting import until
from tests.vllm.environment import needs_vllm
from tests.vllm.jobs import ROWS, generate, job, served
from tests.vllm.serving import engine

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200), needs_vllm]
TWO: dict[str, Any] = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
CHOICES, LAYERS = 2, 4


def test_one_of_tensor_parallel_ranks_calls(tiny_moe: Path, tmp_path: Path) -> None:
    """Over gRPC, and by a frontend in that rank; with experts that vLLM would have divided among ranks, too. No rank holds an expert."""
    with served(tiny_moe, tmp_path) as service, Client(service.target) as client:
        local, far, near, experts = generate(
            job(tiny_moe, **TWO),
            job(tiny_moe, service.target, embedded=False, **TWO),
            job(tiny_moe, service.target, **TWO),
            job(tiny_moe, service.target, enable_expert_parallel=True, **TWO),
        )
        assert not local.error and any(".experts." in name for name in local.parameters)
        for remote in (far, near, experts):
            assert not remote.error and remote.tokens == local.tokens
            assert not any(".experts." in name for name in remote.parameters)
        until(lambda: client.stats().layers[-1].tokens >= 3 * ROWS)
        counts = [(layer.tokens, int(layer.processed.sum())) for layer in client.stats().layers]
        assert counts == [(3 * ROWS, 3 * ROWS * CHOICES)] * LAYERS


def test_each_data_parallel_rank_calls(tiny_moe: Path, tmp_path: Path) -> None:
    """While one answers, the other takes part in its steps with dummy batches."""
    with ExitStack() as stack:
        service = stack.enter_context(served(tiny_moe, tmp_path))
        vllm = stack.enter_context(engine(service.target, '"auto"', tmp_path / "vllm.log", "--data-parallel-size", "2"))
        until(vllm.is_up, 900)
        assert sum(member.name.endswith("(vLLM)") for member in service.frontends.members()) == 2
        alone = [vllm.chat(text) for text in ("The import statement", "def f(")]
        assert [status for status, _ in alone] == [200, 200] and alone[0] != alone[1]
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(vllm.chat, ["The import statement", "def f("] * 8)) == alone * 8
