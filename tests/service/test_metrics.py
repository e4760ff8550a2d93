"""Counts are correct to the token, whatever mix of requests arrives."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from moeserve import Client, MoELayer
from moeserve.config import GatingConfig
from tests.support.closeness import assert_close
from tests.support.harness import ServiceHarness

HIDDEN, EXPERTS, TOP_K = 32, 8, 2
SIZES = {"hidden_size": HIDDEN, "intermediate_size": 16, "num_experts": EXPERTS}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory):
    gating = {"top_k": TOP_K, "capacity_factor": 1.0, "renormalize": "post_drop"}
    config = {"layers": [{**SIZES, "gating": gating}, {**SIZES, "seed": 1, "gating": {"top_k": TOP_K}}], "placement": {"num_hosts": 3}}
    with ServiceHarness(config, "shm", tmp_path_factory.mktemp("s")) as harness:
        yield harness


def test_counters_add_up_to_what_was_answered(service: ServiceHarness) -> None:
    """16 clients, both layers, used_token masks, all dtypes, own gate and caller-routed; every answer equals the layer in one process."""
    references = [
        MoELayer(**SIZES, gating=service.sources[0].spec.gating),
        MoELayer(**SIZES, seed=1, gating=GatingConfig(top_k=TOP_K)),
    ]

    def one(seed: int) -> tuple[int, int, torch.Tensor, torch.Tensor]:
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        layer, tokens = rng.randrange(2), rng.choice((1, 2, 7, 40, 150))
        dtype = rng.choice((torch.float32, torch.bfloat16, torch.float16))
        hidden_states = torch.randn(tokens, HIDDEN, generator=generator).to(dtype)
        used_token = torch.rand(tokens, generator=generator) < 0.8 if rng.random() < 0.5 else None
        choices: dict[str, torch.Tensor] = {}
        if rng.random() < 0.4:
            choices["topk_ids"] = torch.rand(tokens, EXPERTS, generator=generator).topk(TOP_K).indices
            choices["topk_weights"] = torch.rand(tokens, TOP_K, generator=generator)
        with Client(service.target) as client:
            out = client.forward(hidden_states, layer=layer, used_token=used_token, **choices)
        expected = references[layer].run(hidden_states, used_token=used_token, **choices)
        assert_close(out.hidden_states, expected.hidden_states, rounded_to=dtype)
        for name in ("requested", "processed", "dropped", "dropped_tokens"):
            assert torch.equal(getattr(out, name), getattr(expected, name)), name
        used = tokens if used_token is None else int(used_token.sum())
        return layer, used, out.processed, out.dropped

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(one, range(200)))

    sample = service.metrics.registry.get_sample_value
    for layer in range(2):
        mine = [answer for answer in answers if answer[0] == layer]
        used = sum(answer[1] for answer in mine)
        label = {"layer": f"layers.{layer}"}
        assert sample("moeserve_tokens_total", label) == used
        processed = [sample("moeserve_expert_tokens_total", {**label, "expert": str(e)}) for e in range(EXPERTS)]
        dropped = [
            sample("moeserve_expert_dropped_tokens_total", {**label, "expert": str(e), "reason": "capacity"}) for e in range(EXPERTS)
        ]
        assert processed == sum(answer[2] for answer in mine).tolist()
        assert dropped == sum(answer[3] for answer in mine).tolist()
        assert sum(processed) + sum(dropped) == TOP_K * used
        assert (sum(dropped) > 0) == (layer == 0)
    assert sample("moeserve_requests_total", {"method": "Forward", "code": "OK"}) == 200
    assert sample("moeserve_queue_tokens") == 0
    assert all(sample("moeserve_host_queue_tokens", {"host": f"host-{h}"}) == 0 for h in range(3))


def test_a_failed_request_counts_as_a_call_and_as_nothing_else(service: ServiceHarness) -> None:
    sample = service.metrics.registry.get_sample_value
    before = sample("moeserve_tokens_total", {"layer": "layers.0"})
    with Client(service.target) as client, pytest.raises(Exception, match="hidden_states has shape"):
        client.forward(torch.zeros(3, HIDDEN + 1), layer=0)
    assert sample("moeserve_requests_total", {"method": "Forward", "code": "INVALID_ARGUMENT"}) == 1
    assert sample("moeserve_tokens_total", {"layer": "layers.0"}) == before


def test_overflow_in_the_gate_fails_one_request_only(service: ServiceHarness) -> None:
    """Finite activations whose logits overflow are found after batching; the company is not disturbed."""

    def send(value: float) -> object:
        with Client(service.target) as client:
            try:
                return client.forward(torch.full((2, HIDDEN), value), layer=1)
            except Exception as error:
                return error

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(send, [1.0, 3e38] * 16))
    assert all("not finite" in str(answer) for answer in answers[1::2])
    assert all(not isinstance(answer, Exception) for answer in answers[::2])
