"""model.deterministic behind hosts: an answer is bitwise the same whatever requests it is joined with."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from moeserve import Client
from tests.support.harness import CHANNELS, ServiceHarness

ROUNDS = 5


@pytest.mark.parametrize("kind", CHANNELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_joined_requests_are_answered_as_alone(kind: str, dtype: str, tiny_moe: Path, tmp_path: Path) -> None:
    config = {"model": {"checkpoint": tiny_moe, "dtype": dtype, "deterministic": True}, "placement": {"num_hosts": 3}}
    questions = [torch.randn(size, 128, generator=torch.Generator().manual_seed(size)) for size in (1, 2, 7, 33, 130, 400)]
    with ServiceHarness(config, kind, tmp_path) as service, Client(service.target) as client, ThreadPoolExecutor(len(questions)) as pool:
        alone = [client.forward(question, layer=1).hidden_states for question in questions]
        for _ in range(ROUNDS):
            together = pool.map(lambda question: client.forward(question, layer=1).hidden_states, questions)
            assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))
        for question, answers in zip(questions, alone, strict=True):
            assert torch.equal(client.forward(question[:1], layer=1).hidden_states[0], answers[0])
