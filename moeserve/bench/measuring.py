"""What a call costs on a running service: one caller, requests of several sizes, and the times of their stages in the frontend."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final

from moeserve.api.wire import WireRequest
from moeserve.bench.costs import Costs
from moeserve.bench.fit import Measurement, RequestWork, fitted
from moeserve.bench.load import check_answer
from moeserve.bench.runs import Inputs, served_layer
from moeserve.client import AsyncClient, LayerInfo
from moeserve.errors import ConfigError, InvalidRequest
from moeserve.observe.stats import LayerStats, ServiceStats
from moeserve.observe.summary import counts_on, demand, since

#: tokens of the requests, as far as the service takes so many
_TOKENS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
#: over all sizes, so that what disturbs the machine disturbs all of them
_ROUNDS: Final = 8
_REQUESTS, _WARM_UP = 6, 2


async def measured_costs(client: AsyncClient, wanted: int | str, inputs: Inputs) -> Costs:
    """Of one layer; nobody else should call meanwhile. Raises ConfigError when its costs cannot be told, or the service's error."""
    async with client:
        layer = served_layer(await client.layers(), wanted)
        started = await client.stats()
        before = _counts(started, layer)
        _check(layer, before)
        sizes = {tokens: Measurement(tokens) for tokens in _TOKENS}
        for number in range(_ROUNDS):
            for tokens in list(sizes):
                try:
                    await _measure(client, layer, inputs.make(layer, tokens), sizes[tokens])
                except InvalidRequest:
                    if number or len(sizes) <= 2:
                        raise
                    del sizes[tokens]  # larger than the service takes
        after = _counts(await _later(client, started), layer)
    asked = [now - then for now, then in zip(demand(after), demand(before), strict=True)]
    work = RequestWork.of([(one.host, one.experts) for one in after.placement], asked, layer.top_k)
    return fitted((layer.hidden_size, layer.intermediate_size), [*sizes.values()], work)


async def _measure(client: AsyncClient, layer: LayerInfo, requests: Sequence[WireRequest], into: Measurement) -> None:
    """A few requests, one after the other."""
    await _ask(client, layer, requests[-_WARM_UP:])
    before = await client.stats()
    asked = requests[:_REQUESTS]
    into.latencies_s.append(await _ask(client, layer, asked))
    after = await _later(client, before)
    for stage in since(after.stages, before.stages):
        into.stages_s.setdefault(stage.name, []).append(stage.sum_s / len(asked))


async def _ask(client: AsyncClient, layer: LayerInfo, requests: Sequence[WireRequest]) -> list[float]:
    """Seconds of each."""
    seconds = []
    for request in requests:
        began = time.perf_counter()
        answer = await client.forward(request.hidden_states, layer=layer.index, token_ids=request.token_ids)
        seconds.append(time.perf_counter() - began)
        check_answer(answer, request.hidden_states)
    return seconds


async def _later(client: AsyncClient, before: ServiceStats) -> ServiceStats:
    """The counts of the same frontend. Raises ConfigError."""
    now = await client.stats()
    if not counts_on(now, before):
        raise ConfigError("--costs needs the counts of one frontend, but another has answered, or it was started again")
    return now


def _counts(stats: ServiceStats, layer: LayerInfo) -> LayerStats:
    return next(each for each in stats.layers if each.name == layer.name)


def _check(layer: LayerInfo, counts: LayerStats) -> None:
    if not layer.intermediate_size:
        raise ConfigError(
            f"the experts of layer {layer.name} are modules; allowed for --costs: feed-forward experts, whose sizes are known"
        )
    if counts.tensor_parallel > 1:
        raise ConfigError(f"the experts of layer {layer.name} are in {counts.tensor_parallel} shards; allowed for --costs: whole experts")
