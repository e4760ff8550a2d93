"""Loads on one layer of a service, one after the other.

T tokens, H hidden size.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Final

import torch

from moeserve.api.find_layer import find_layer
from moeserve.api.output import ForwardOutput
from moeserve.bench.load import Load, Measured, Send, check_answer, run
from moeserve.bench.report import progress_bar
from moeserve.bench.stream_sender import StreamSender
from moeserve.client import AsyncClient, LayerInfo, WireRequest
from moeserve.errors import InvalidRequest

#: different inputs, sent in turn, so that requests need different experts
_NUM_INPUTS: Final = 16
#: of one message, as clients send them, and of all inputs of a run
_MOST_BYTES: Final = 2**30
_MOST_BYTES_OF_ALL: Final = 2**31


class Inputs:
    """Random hidden_states [T, H], the same for the same seed, 0..2^63-1."""

    def __init__(self, dtype: torch.dtype, with_token_ids: bool, seed: int) -> None:
        self._dtype, self._with_token_ids, self._seed = dtype, with_token_ids, seed

    def make(self, layer: LayerInfo, tokens: int) -> list[WireRequest]:
        """Requests of so many tokens, to be sent in turn: fewer of large ones. Raises InvalidRequest where no message has so many bytes."""
        nbytes = tokens * layer.hidden_size * self._dtype.itemsize
        if nbytes > _MOST_BYTES:
            raise InvalidRequest(f"{tokens} tokens of layer {layer.name} have {nbytes} bytes; a message has at most {_MOST_BYTES}")
        generator = torch.Generator().manual_seed(self._seed)
        return [
            WireRequest(
                torch.randn(tokens, layer.hidden_size, generator=generator).to(self._dtype),
                layer.index,
                token_ids=torch.randint(0, 2**31, (tokens,), generator=generator) if self._with_token_ids else None,
            )
            for _ in range(max(1, min(_NUM_INPUTS, _MOST_BYTES_OF_ALL // nbytes)))
        ]


async def run_all(
    client: AsyncClient,
    wanted: int | str,
    loads: list[Load],
    inputs: Inputs,
    sender: StreamSender | None,
    warmup_requests: int,
    measured: list[Measured],
) -> None:
    """Runs each load on the layer `wanted`; appends the results of complete runs to `measured`."""
    async with client, sender or contextlib.nullcontext():
        layer = served_layer(await client.layers(), wanted)
        with progress_bar(len(loads)) as show:
            for number, load in enumerate(loads):
                requests = inputs.make(layer, load.tokens)
                send, check = _sender(client, sender, layer.index, requests), partial(check_answer, like=requests[0].hidden_states)
                if warmup_requests:
                    await run(Load(load.tokens, load.concurrency or 8, None, None, warmup_requests), send, check, lambda _: None)
                measured.append(await run(load, send, check, partial(show, number)))


def served_layer(layers: list[LayerInfo], wanted: int | str) -> LayerInfo:
    """By position or name. Raises UnknownLayer."""
    return layers[find_layer([layer.name for layer in layers], wanted)]


def _sender(client: AsyncClient, stream: StreamSender | None, layer: int, requests: list[WireRequest]) -> Send:
    async def send(number: int) -> ForwardOutput:
        request = requests[number % len(requests)]
        if stream is not None:
            return await stream.send(request)
        return await client.forward(request.hidden_states, layer=layer, token_ids=request.token_ids)

    return send
