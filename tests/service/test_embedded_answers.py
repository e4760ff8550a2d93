"""A frontend inside a program: it answers as a service does, whoever asks."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import moeserve
from moeserve import Client, EmbeddedClient, MoELayer, MoEServeError
from moeserve.api.output import ForwardOutput
from moeserve.api.wire import WireRequest
from tests.support.closeness import assert_close
from tests.support.two_layers import CONFIG, LAYERS, tokens
from tests.support.waiting import until

HIDDEN, EXPERTS = 16, 8
X = tokens(0)
IDS = torch.arange(len(X) * 3).view(-1, 3) % EXPERTS
WEIGHTS = torch.rand(len(X), 3, generator=torch.Generator().manual_seed(1))
OPEN = [{**layer, "gating": {"top_k": 3, "request_overrides": ["capacity_factor", "noise"]}} for layer in LAYERS]

Call = Callable[[Any], Any]

ANSWERED: dict[str, Call] = {
    "plain": lambda client: client.forward(X),
    "routing": lambda client: client.forward(X, layer=1, return_routing=True),
    "bfloat16": lambda client: client.forward(X.bfloat16(), layer="layers.1", return_routing=True),
    "one": lambda client: client.forward(X[:1], model="moe"),
    "empty": lambda client: client.forward(X[:0], return_routing=True),
    "unused": lambda client: client.forward(X, used_token=torch.arange(len(X)) % 2 == 0, return_routing=True),
    "caller routes": lambda client: client.forward(X, topk_ids=IDS.int(), topk_weights=WEIGHTS.double(), return_routing=True),
    "options": lambda client: client.forward(X, capacity_factor=0.5, noise="jitter", seed=7, return_routing=True),
    "strided": lambda client: client.forward(torch.cat([X, X], dim=1).requires_grad_()[:, :HIDDEN]),
    "layers": lambda client: client.layers(),
    "ready": lambda client: client.ready(),
}
REFUSED: dict[str, Call] = {
    "layer": lambda client: client.forward(X, layer=2),
    "name": lambda client: client.forward(X, layer="nobody"),
    "negative": lambda client: client.forward(X, layer=-1),
    "kind of layer": lambda client: client.forward(X, layer=1.5),
    "model": lambda client: client.forward(X, model="another"),
    "kind of model": lambda client: client.forward(X, model=3),
    "width": lambda client: client.forward(X[:, :3]),
    "dimensions": lambda client: client.forward(X[0]),
    "no tensor": lambda client: client.forward(X.tolist()),
    "no data": lambda client: client.forward(X.to("meta")),
    "sparse": lambda client: client.forward(X, topk_ids=IDS.to_sparse(), topk_weights=WEIGHTS),
    "integers": lambda client: client.forward(X.int()),
    "infinite": lambda client: client.forward(X / 0),
    "mask": lambda client: client.forward(X, used_token=torch.ones(3, dtype=torch.bool)),
    "half a routing": lambda client: client.forward(X, topk_ids=IDS),
    "twice": lambda client: client.forward(X, topk_ids=IDS * 0, topk_weights=WEIGHTS),
    "ids": lambda client: client.forward(X, topk_ids=IDS.char(), topk_weights=WEIGHTS),
    "noise": lambda client: client.forward(X, noise="loud"),
    "kind of noise": lambda client: client.forward(X, noise=3),
    "capacity": lambda client: client.forward(X, capacity_factor=-1.0),
    "seed": lambda client: client.forward(X, seed=-1),
    "kind of flag": lambda client: client.forward(X, return_routing="yes"),
    "timeout": lambda client: client.forward(X, timeout=0),
    "timeout of layers": lambda client: client.layers(timeout="soon"),
}


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    """Of a service of this process, whose hosts are threads, and that gave a token to nobody."""
    with moeserve.serve({**CONFIG, "layers": OPEN, "server": {"port": 0, "metrics_port": 0}}, cluster="threads") as service:
        yield service.target


@pytest.fixture(scope="module")
def embedded(target: str) -> Iterator[EmbeddedClient]:
    with EmbeddedClient(target) as client:
        yield client


@pytest.mark.parametrize("call", ANSWERED.values(), ids=ANSWERED)
def test_answers_are_those_of_a_client(target: str, embedded: EmbeddedClient, call: Call) -> None:
    with Client(target) as client:
        ours, theirs = call(embedded), call(client)
    if not isinstance(ours, ForwardOutput):
        assert ours == theirs and ours
        return
    for name, value in vars(theirs).items():
        if name == "hidden_states":
            assert_close(ours.hidden_states, value, rounded_to=value.dtype)
            ours.hidden_states[:] = 0
        elif isinstance(value, torch.Tensor):
            assert getattr(ours, name).dtype == value.dtype and torch.equal(getattr(ours, name), value), name
            getattr(ours, name)[:] = 0  # it is the caller's own
        else:
            assert getattr(ours, name) == value, name


@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED)
def test_refusals_are_those_of_a_client(target: str, embedded: EmbeddedClient, call: Call) -> None:
    with Client(target) as client, pytest.raises(MoEServeError) as theirs:
        call(client)
    with pytest.raises(type(theirs.value)) as ours:
        call(embedded)
    assert type(ours.value) is type(theirs.value)
    assert str(ours.value) == str(theirs.value) or "cannot be sent" in str(theirs.value)


def test_what_the_calling_thread_has_set_changes_no_answer(embedded: EmbeddedClient) -> None:
    expected = embedded.forward(X, return_routing=True)
    settings = {
        "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        "device": lambda: torch.device("meta"),
        "inference": torch.inference_mode,
        "no gradients": torch.no_grad,
    }
    for name, setting in settings.items():
        with setting():
            answer = embedded.forward(X, return_routing=True)
        assert torch.equal(answer.topk_ids, expected.topk_ids), name
        assert_close(answer.hidden_states, expected.hidden_states)
    torch.set_default_dtype(torch.float64)
    try:
        assert_close(embedded.forward(X).hidden_states, expected.hidden_states)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_program_with_an_event_loop_may_wait_in_it(embedded: EmbeddedClient) -> None:
    async def ask() -> torch.Tensor:
        return embedded.forward(X).hidden_states

    assert_close(asyncio.run(ask()), embedded.forward(X).hidden_states)


def test_threads_share_it(embedded: EmbeddedClient) -> None:
    references = [MoELayer(**layer) for layer in LAYERS]

    def ask(caller: int) -> None:
        for number in range(30):
            rows, layer = tokens(100 * caller + number), number % 2
            assert_close(embedded.forward(rows, layer=layer).hidden_states, references[layer](rows))

    before = sum(layer.tokens for layer in embedded.stats().layers)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(8)))
    assert sum(layer.tokens for layer in embedded.stats().layers) - before == 8 * 30 * len(X)


def test_a_stream_of_requests(embedded: EmbeddedClient) -> None:
    """Requests may wait for answers to earlier ones; an error is one answer; what the source raises comes last."""
    answered = threading.Event()

    def requests() -> Iterator[WireRequest]:
        yield WireRequest(X, layer=1, request_id="good")
        yield WireRequest(X, layer=9, request_id="bad")
        assert answered.wait(30)
        yield from (WireRequest(X[:1], request_id=str(number)) for number in range(100))
        raise LookupError("the source")

    found = {}
    with pytest.raises(LookupError, match="the source"):
        for response in embedded.forward_stream(requests()):
            found[response.request_id] = response.result
            if len(found) == 2:
                answered.set()
    assert isinstance(found.pop("bad"), moeserve.UnknownLayer)
    assert_close(found.pop("good").hidden_states, embedded.forward(X, layer=1).hidden_states)
    assert len(found) == 100 and all(answer.hidden_states.shape == (1, HIDDEN) for answer in found.values())
    assert next(iter(embedded.forward_stream(WireRequest(X[:1]) for _ in itertools.count()))).result.processed.sum() == 3


@pytest.mark.parametrize("goes_on", [False, True], ids=["waits", "goes on"])
def test_a_stream_ends_at_its_deadline(target: str, embedded: EmbeddedClient, goes_on: bool) -> None:
    """As one over gRPC does, whatever its source waits for, or has to say."""
    ended = threading.Event()

    def requests() -> Iterator[WireRequest]:
        yield WireRequest(X[:1])
        while goes_on or not ended.wait(30):
            yield WireRequest(X[:1])

    try:
        with Client(target) as client:
            for one in (client, embedded):
                with pytest.raises(moeserve.DeadlineExceeded):
                    for _ in one.forward_stream(requests(), timeout=0.5):
                        pass
    finally:
        ended.set()


@pytest.mark.parametrize("wrong", [X, WireRequest(X.long())], ids=["no request", "whole numbers"])
def test_what_no_service_accepts_ends_a_stream(embedded: EmbeddedClient, wrong: Any) -> None:
    answered = []
    with pytest.raises(moeserve.InvalidRequest, match=r"^(a request must be a WireRequest, got Tensor|hidden_states is int64; .*)$"):
        for response in embedded.forward_stream([WireRequest(X, request_id="good"), wrong, WireRequest(X)]):
            answered.append(response.request_id)
    assert answered == ["good"]


def test_calls_that_nobody_waits_for_yet(target: str) -> None:
    others = set(threading.enumerate())
    with EmbeddedClient(target) as client:
        many = [client.submit(X[:1], layer=number % 2, return_routing=True) for number in range(150)]
        bad = client.submit(X, layer=9)
        assert all(future.result(30).topk_ids.shape == (1, 3) for future in many)
        assert_close(many[1].result().hidden_states, client.forward(X[:1], layer=1).hidden_states)
        with pytest.raises(moeserve.UnknownLayer):
            bad.result(30)
        with pytest.raises(moeserve.InvalidRequest, match="timeout is 0"):
            client.submit(X, timeout=0)
    with pytest.raises(MoEServeError, match="closed"):
        client.submit(X)
    until(lambda: not any(thread.name.startswith("moeserve-submit") for thread in {*threading.enumerate()} - others))
