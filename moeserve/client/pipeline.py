"""Batches through one layer after the other, many at once: while one is in the second stage of the service, the next is in the first.

T tokens, H hidden size.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from itertools import islice

import torch

from moeserve.api.wire import WireRequest
from moeserve.client.async_client import AsyncClient
from moeserve.errors import InvalidRequest, MoEServeError

#: a function of a layer's answer (and its position among `layers`): the input of the next layer
Between = Callable[[int, torch.Tensor], torch.Tensor]

_END = None


async def through_layers(
    client: AsyncClient,
    batches: Iterable[torch.Tensor],
    layers: Sequence[int | str],
    between: Between = lambda _, hidden_states: hidden_states,
    in_flight: int = 8,
    timeout: float | None = None,
) -> AsyncIterator[torch.Tensor]:
    """Every batch [T, H] through `layers` in order, over one ForwardStream; answers [T, H] in the order of the batches.

    Up to `in_flight` batches are in progress, so all pipeline stages of the service have work (GPipe, Huang et al. 2019,
    arXiv 1811.06965); those count that wait for the answer of an earlier one. A failed batch ends everything with its error. `timeout`, in
    seconds, is for all batches. Raises InvalidRequest for an `in_flight` below 1, and without layers.
    """
    _check(layers, in_flight)
    waiting: asyncio.Queue[WireRequest | None] = asyncio.Queue()
    source = enumerate(batches)
    done: dict[int, torch.Tensor] = {}
    next_out = started = 0

    def send(number: int, position: int, hidden_states: torch.Tensor) -> None:
        waiting.put_nowait(WireRequest(hidden_states, layer=layers[position], request_id=f"{number}/{position}"))

    def start() -> None:
        nonlocal started
        for number, hidden_states in islice(source, in_flight - (started - next_out)):
            started = number + 1
            send(number, 0, hidden_states)

    start()
    if not started:
        return
    async for response in client.forward_stream(_until_end(waiting), timeout=timeout):
        if isinstance(response.result, MoEServeError):
            raise response.result
        number, position = map(int, response.request_id.split("/"))
        hidden_states = between(position, response.result.hidden_states)
        if position + 1 < len(layers):
            send(number, position + 1, hidden_states)
            continue
        done[number] = hidden_states
        while next_out in done:
            yield done.pop(next_out)
            next_out += 1
        start()
        if next_out == started:
            waiting.put_nowait(_END)


def _check(layers: Sequence[int | str], in_flight: int) -> None:
    if not len(layers):
        raise InvalidRequest("layers is empty; allowed: at least one", "layers")
    if in_flight < 1:
        raise InvalidRequest(f"in_flight is {in_flight}; allowed: at least 1", "in_flight")


async def _until_end(waiting: asyncio.Queue[WireRequest | None]) -> AsyncIterator[WireRequest]:
    while (request := await waiting.get()) is not _END:
        yield request
