"""What clients see of a storm, and what the service says of itself meanwhile: every answer and every status is checked at once."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from moeserve import Client
from moeserve.client import AdminClient
from tests.cluster.storm_weights import EXPERTS, LAYERS, QUESTIONS, DenseLayer, Mix
from tests.support.closeness import assert_close

#: copies of every expert at least
COPIES = 2


class Weights:
    """The revisions of each layer, as administrators have asked for them, and the earliest that an answer may have."""

    def __init__(self) -> None:
        self._mixes: list[list[Mix]] = [[(0,) * EXPERTS] for _ in range(LAYERS)]
        self._least = [1] * LAYERS
        self._one_at_a_time = threading.Lock()

    @contextmanager
    def swap(self, layers: Sequence[int], experts: Sequence[int], version: int) -> Iterator[None]:
        """From here on answers may have the new weights; once the block has ended well, none has the old ones."""
        with self._one_at_a_time:
            for layer in layers:
                mixes = self._mixes[layer]
                mixes.append(tuple(version if expert in experts else old for expert, old in enumerate(mixes[-1])))
            try:
                yield
            except BaseException:
                for layer in layers:
                    self._mixes[layer].pop()
                raise
            for layer in layers:
                self._least[layer] = len(self._mixes[layer])

    def least(self, layer: int) -> int:
        return self._least[layer]

    def of(self, layer: int, revision: int) -> Mix:
        assert 1 <= revision <= len(self._mixes[layer]), f"nobody has asked for revision {revision} of layer {layer}"
        return self._mixes[layer][revision - 1]


class StormLoad:
    """Clients that ask without pause, each call once, and watchers of what the service says of itself."""

    def __init__(self, target: str, token: str, layers: Sequence[DenseLayer], weights: Weights) -> None:
        self._target, self._token, self._layers, self._weights = target, token, layers, weights
        self._stop = threading.Event()
        self._at_end: list[Callable[[], object]] = []
        #: calls of each layer
        self.answered = [0] * LAYERS

    @contextmanager
    def of(self, clients: int) -> Iterator[None]:
        """Until the block ends. Raises what one of them has found."""
        work = [self._watch_epochs, self._watch_health, *(partial(self._ask, client) for client in range(clients))]
        with ThreadPoolExecutor(len(work)) as pool:
            self._running = [pool.submit(each) for each in work]
            try:
                yield
            finally:
                self._stop.set()
                for end in self._at_end:
                    end()
        assert self.goes_on()

    def goes_on(self) -> bool:
        """Raises what one of them has found so far."""
        for each in self._running:
            if each.done():
                each.result()
        return True

    def _ask(self, number: int) -> None:
        chance = random.Random(number)
        seen = [1] * LAYERS
        with Client(self._target, timeout=60.0, retry=False) as client:
            while not self._stop.is_set():
                layer, question = chance.randrange(LAYERS), chance.randrange(QUESTIONS)
                least = max(seen[layer], self._weights.least(layer))
                dense = self._layers[layer]
                answer = client.forward(dense.questions[question], layer=layer)
                assert answer.model_revision >= least, f"layer {layer} answers with revision {answer.model_revision} after {least}"
                assert_close(answer.hidden_states, dense.answer(question, self._weights.of(layer, answer.model_revision)))
                seen[layer] = answer.model_revision
                self.answered[layer] += 1

    def _watch_epochs(self) -> None:
        epoch = 0
        with AdminClient(self._target, self._token) as admin:
            while not self._stop.wait(0.02):
                status = admin.status()
                assert status.epoch >= epoch, f"epoch {status.epoch} after {epoch}"
                epoch = status.epoch
                for layer in status.layers:
                    hosts = {expert: {held.host for held in layer.placement if expert in held.experts} for expert in range(EXPERTS)}
                    assert min(map(len, hosts.values())) >= COPIES, (
                        f"epoch {epoch}, layer {layer.name}: the hosts of its experts are {hosts}"
                    )

    def _watch_health(self) -> None:
        """SERVING: every expert has a live copy."""
        with grpc.insecure_channel(self._target) as channel:
            states = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            self._at_end.append(states.cancel)
            try:
                for state in states:
                    assert state.status == health_pb2.HealthCheckResponse.SERVING, "an expert has no live copy"
            except grpc.RpcError:
                assert self._stop.is_set(), "the watch has ended"
