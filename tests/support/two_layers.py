"""Two layers of eight experts on two hosts, rows for them, and callers that compare every answer."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch

from moeserve import Client, MoELayer
from moeserve.checkpoints import layer_sources
from moeserve.config import LayerSpec, load_config
from tests.support.closeness import assert_close

LAYERS = [{"hidden_size": 16, "intermediate_size": 24, "num_experts": 8, "seed": seed, "gating": {"top_k": 3}} for seed in range(2)]

CONFIG = {"layers": LAYERS, "placement": {"num_hosts": 2}}


def tokens(seed: int) -> torch.Tensor:
    return torch.randn(30, 16, generator=torch.Generator().manual_seed(seed))


def spec() -> LayerSpec:
    """Of both."""
    return layer_sources(load_config({"layers": LAYERS}))[0].spec


def answers(target: str, times: int = 3) -> None:
    with Client(target) as client:
        for seed in range(times):
            assert_close(client.forward(tokens(seed), layer=seed % 2).hidden_states, MoELayer(**LAYERS[seed % 2])(tokens(seed)))


class Load:
    """Callers that ask without pause, and compare every answer with the layer in this process."""

    def __init__(self, target: str, callers: int) -> None:
        self._references = [MoELayer(**layer) for layer in LAYERS]
        self._target, self._callers = target, callers
        self._stop, self._answered = threading.Event(), threading.Semaphore(0)

    def __enter__(self) -> Load:
        self._pool = ThreadPoolExecutor(self._callers)
        self._running = [self._pool.submit(self._call, number) for number in range(self._callers)]
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown()
        assert sum(future.result() for future in self._running) > 0

    def goes_on(self, answers: int = 30) -> None:
        for _ in range(answers):
            assert self._answered.acquire(timeout=30)

    def _call(self, number: int) -> int:
        count = 0
        with Client(self._target) as client:
            while not self._stop.is_set():
                seed, layer = 10_000 * number + count, count % 2
                assert_close(client.forward(tokens(seed), layer=layer).hidden_states, self._references[layer](tokens(seed)))
                count += 1
                self._answered.release()
        return count
