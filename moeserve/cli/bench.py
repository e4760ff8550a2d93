"""`moeserve bench`: load on a running service, and how it took it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Final

import torch
import typer

from moeserve.api.output import ForwardOutput
from moeserve.api.tensors import FLOAT_DTYPES
from moeserve.bench.load import Load, Measured, Send, check_answer, run
from moeserve.bench.report import print_json, print_table, progress_bar
from moeserve.bench.stream_sender import StreamSender
from moeserve.cli.signals import until_signal
from moeserve.cli.target import Target, TlsCa, TokenFile, layer_of, timeout_of, tls_of, token_of
from moeserve.client import AsyncClient, LayerInfo, WireRequest
from moeserve.errors import ConfigError, UnknownLayer

#: different inputs that are sent in turn, so that not every request asks the same experts
_NUM_INPUTS: Final = 16
_DURATION_S: Final = 5.0


def bench(
    target: Target,
    layer: Annotated[str, typer.Option(help="Position of the layer (0 = the first MoE layer) or its name.")] = "0",
    tokens: Annotated[str, typer.Option(help="Tokens of a request; several, as in 1,64,1024 = one run for each.")] = "64",
    concurrency: Annotated[
        str | None, typer.Option(help="Requests under way at any time; several = one run for each.  [default: 8]")
    ] = None,
    rate: Annotated[
        str | None, typer.Option(help="Instead: requests/s to start, whatever became of earlier ones; several = sweep.")
    ] = None,
    duration_s: Annotated[float | None, typer.Option(help="Length of a run in seconds.  [default: 5]")] = None,
    requests: Annotated[int | None, typer.Option(help="Instead: requests of a run.")] = None,
    dtype: Annotated[str, typer.Option(help="Element type that is sent: float32, float16, bfloat16.")] = "float32",
    stream: Annotated[bool, typer.Option("--stream", help="Over one ForwardStream instead of a Forward for each request.")] = False,
    token_ids: Annotated[bool, typer.Option("--token-ids", help="Send token ids too; layers with routing = hash need them.")] = False,
    warmup_requests: Annotated[int, typer.Option(help="Requests before each run, not measured.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the random inputs.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
    token_file: TokenFile = None,
    tls_ca: TlsCa = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for an answer.")] = 30.0,
) -> int:
    """Load one layer and show tokens/s, requests/s, latencies, drops and errors; exit 1 when every request failed.

    Latency at a --rate counts from when a request should have started, so a service that falls behind cannot hide it.
    """
    loads = _loads(tokens, concurrency, rate, duration_s, requests)
    _check(dtype in FLOAT_DTYPES, f"--dtype is {dtype}; allowed: {', '.join(FLOAT_DTYPES)}")
    _check(warmup_requests >= 0, f"--warmup-requests is {warmup_requests}; allowed: 0 and more")
    timeout_s = timeout_of(timeout)
    client = AsyncClient(target, token=token_of(token_file), tls=tls_of(tls_ca), timeout=timeout_s)
    measured: list[Measured] = []
    try:
        sender = StreamSender(client, timeout_s) if stream else None
        inputs = _Inputs(FLOAT_DTYPES[dtype], token_ids, seed)
        asyncio.run(until_signal(_bench(client, layer_of(layer), loads, inputs, sender, warmup_requests, measured)))
    finally:
        # After Ctrl-C too: runs that are complete are not lost.
        if measured:
            runs = [one.as_json() for one in measured]
            if as_json:
                print_json({"target": target, "layer": layer, "dtype": dtype, "stream": stream, "runs": runs})
            else:
                print_table(runs)
    return 1 if all(not one.latencies_s for one in measured) else 0


def _loads(tokens: str, concurrency: str | None, rate: str | None, duration_s: float | None, requests: int | None) -> list[Load]:
    _check(concurrency is None or rate is None, "--concurrency and --rate exclude each other: a rate starts requests by the clock")
    _check(duration_s is None or requests is None, "--duration-s and --requests exclude each other")
    _check(duration_s is None or 0 < duration_s <= 86_400, f"--duration-s is {duration_s}; allowed: more than 0, at most 86400")
    _check(requests is None or requests > 0, f"--requests is {requests}; allowed: 1 and more")
    if requests is None and duration_s is None:
        duration_s = _DURATION_S
    sizes = _numbers("--tokens", tokens, int)
    if rate is not None:
        return [Load(size, None, each, duration_s, requests) for size in sizes for each in _numbers("--rate", rate, float)]
    return [Load(size, each, None, duration_s, requests) for size in sizes for each in _numbers("--concurrency", concurrency or "8", int)]


def _numbers(option: str, text: str, kind: Callable[[str], Any]) -> list[Any]:
    try:
        numbers = [kind(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} is {text!r}; expected a number, or several as in 1,8,64") from None
    _check(all(0 < number <= 1_000_000 for number in numbers), f"{option} is {text}; allowed: more than 0, at most 1000000")
    return numbers


def _check(holds: bool, sentence: str) -> None:
    if not holds:
        raise ConfigError(sentence)


class _Inputs:
    """Random hidden_states [T, H], the same for the same seed."""

    def __init__(self, dtype: torch.dtype, with_token_ids: bool, seed: int) -> None:
        self._dtype, self._with_token_ids, self._seed = dtype, with_token_ids, seed

    def make(self, layer: LayerInfo, tokens: int) -> list[WireRequest]:
        generator = torch.Generator().manual_seed(self._seed)
        return [
            WireRequest(
                torch.randn(tokens, layer.hidden_size, generator=generator).to(self._dtype),
                layer.index,
                token_ids=torch.randint(0, 2**31, (tokens,), generator=generator) if self._with_token_ids else None,
            )
            for _ in range(_NUM_INPUTS)
        ]


async def _bench(
    client: AsyncClient,
    wanted: int | str,
    loads: list[Load],
    inputs: _Inputs,
    sender: StreamSender | None,
    warmup_requests: int,
    measured: list[Measured],
) -> None:
    async with client, sender or contextlib.nullcontext():
        layer = _find(await client.layers(), wanted)
        with progress_bar(len(loads)) as show:
            for number, load in enumerate(loads):
                requests = inputs.make(layer, load.tokens)
                send, check = _sender(client, sender, layer.index, requests), partial(check_answer, like=requests[0].hidden_states)
                if warmup_requests:
                    await run(Load(load.tokens, load.concurrency or 8, None, None, warmup_requests), send, check, lambda _: None)
                measured.append(await run(load, send, check, partial(show, number)))


def _find(layers: list[LayerInfo], wanted: int | str) -> LayerInfo:
    for layer in layers:
        if wanted in (layer.index, layer.name):
            return layer
    raise UnknownLayer(f"there is no layer {wanted}; served: {', '.join(layer.name for layer in layers[:8])}")


def _sender(client: AsyncClient, stream: StreamSender | None, layer: int, requests: list[WireRequest]) -> Send:
    async def send(number: int) -> ForwardOutput:
        request = requests[number % len(requests)]
        if stream is not None:
            return await stream.send(request)
        return await client.forward(request.hidden_states, layer=layer, token_ids=request.token_ids)

    return send
