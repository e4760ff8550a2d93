"""From routing to messages and back: one stable sort, then slices.

T tokens, K choices per token, P kept (token, choice) pairs, R rows sent to one host, N pairs of one host, H hidden size, D hosts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from moeserve.config import CopyChoice
from moeserve.kernels import Dispatched, add_answers, dispatch_pairs, pairs_of
from moeserve.placement import LayerPlacement, choose_copies

Integers = npt.NDArray[np.integer]
Floats = npt.NDArray[np.float32]
Booleans = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class HostWork:
    """One host's work for one batch.

    rows          [R] int64, ascending: the tokens it receives, each once however many of their experts live there
    row_index     [N] int32: which of those rows a pair reads
    local_experts [N] int32, ascending: the host's expert of each pair; the last one may be the layer's shared expert
    weights       [N] float32: the gate's weight of the pair
    """

    host: int
    rows: torch.Tensor
    row_index: torch.Tensor
    local_experts: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True)
class HostLoads:
    """The state of a layer's hosts when a batch is planned: is_live [D], load [D] rows sent and not yet answered; how copies are chosen."""

    is_live: Booleans
    load: Integers
    copy_choice: CopyChoice = "least_outstanding"

    @classmethod
    def all_idle(cls, num_hosts: int) -> HostLoads:
        """All hosts live and without work."""
        return cls(np.ones(num_hosts, dtype=np.bool_), np.zeros(num_hosts, dtype=np.int64))


class SharedWork(NamedTuple):
    """The work of the shared expert: weights [T] float32, and which tokens are used, [T] bool, None = all."""

    weights: torch.Tensor
    used_token: torch.Tensor | None


class Dispatch(NamedTuple):
    """works: busy hosts in the order of their numbers; alone [A] int64: used tokens that go to no host and need the shared expert."""

    works: list[HostWork]
    alone: torch.Tensor


def plan(
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    kept: torch.Tensor,
    placement: LayerPlacement,
    hosts: HostLoads | None = None,
    shared: SharedWork | None = None,
) -> Dispatch:
    """Split a routed batch by host.

    topk_ids [T, K] int64, topk_weights [T, K] float32, kept [T, K] bool (false = dropped or not routed at all), all on the CPU. Experts
    that do not live on hosts are left out. Pairs of one expert keep the order of their tokens.
    """
    if shared is None and placement.copies.shape[1] == placement.tensor_parallel == 1:
        found = pairs_of(topk_ids, topk_weights, kept, placement.places)
        if found is not None:
            return Dispatch(_by_host(*found, len(topk_ids), placement, None, None), torch.empty(0, dtype=torch.int64))
    # NumPy: a call costs a third of what torch's does, and there are some twenty of them, however few the tokens.
    num_tokens, top_k = topk_ids.shape
    experts = topk_ids.numpy().reshape(-1)
    pairs = np.flatnonzero(kept.numpy().reshape(-1) & (experts < placement.num_experts))
    tokens, units, weights = pairs // top_k, experts[pairs], topk_weights.numpy().reshape(-1)[pairs]
    if placement.tensor_parallel > 1:
        shards = np.tile(np.arange(placement.tensor_parallel), len(pairs))
        tokens, units, weights = (np.repeat(each, placement.tensor_parallel) for each in (tokens, units, weights))
        units = units * placement.tensor_parallel + shards
    physical = choose_copies(units, placement, *_state(hosts, placement))
    alone = np.empty(0, dtype=np.int64)
    shared_host = None
    if shared is not None:
        used = np.ones(num_tokens, dtype=np.bool_) if shared.used_token is None else shared.used_token.numpy()
        shared_host = _shared_hosts(tokens, placement.host_of_physical[physical], used, placement.num_hosts)
        alone = np.flatnonzero(used & (shared_host < 0))
    return Dispatch(_by_host(tokens, physical, weights, num_tokens, placement, shared_host, shared), torch.from_numpy(alone))


def plan_again(lost: Sequence[HostWork], num_tokens: int, placement: LayerPlacement, hosts: HostLoads) -> list[HostWork]:
    """The same pairs for other copies, as far as there are any that live; the rest stays where it was.

    Every host has the shared expert: its tokens go where other pairs of theirs go, or, if there are none, to a host that has little to do.
    """
    if all(is_shared_alone(work, placement) for work in lost):
        return _shared_elsewhere(lost, placement, hosts)
    tokens = np.concatenate([work.rows.numpy()[work.row_index.numpy()] for work in lost])
    local_experts = np.concatenate([work.local_experts.numpy() for work in lost])
    weights = np.concatenate([work.weights.numpy() for work in lost])
    host = np.repeat([work.host for work in lost], [len(work.local_experts) for work in lost])
    is_shared = local_experts == placement.shared_local_expert[host]
    first = np.searchsorted(placement.host_of_physical, host)
    units = placement.unit_of_physical[(first + local_experts)[~is_shared]]
    order = tokens[~is_shared].argsort(kind="stable")
    physical = choose_copies(units[order], placement, hosts.is_live, hosts.load, hosts.copy_choice)
    routed = tokens[~is_shared][order]
    shared = shared_host = None
    if is_shared.any():
        used, share = np.zeros(num_tokens, dtype=np.bool_), np.zeros(num_tokens, dtype=np.float32)
        used[tokens[is_shared]], share[tokens[is_shared]] = True, weights[is_shared]
        shared = SharedWork(torch.from_numpy(share), None)
        shared_host = _shared_hosts(routed, placement.host_of_physical[physical], used, placement.num_hosts)
    return _by_host(routed, physical, weights[~is_shared][order], num_tokens, placement, shared_host, shared)


def is_shared_alone(work: HostWork, placement: LayerPlacement) -> bool:
    """Whether it asks for nothing but the shared expert."""
    return bool((work.local_experts == int(placement.shared_local_expert[work.host])).all())


def _shared_elsewhere(lost: Sequence[HostWork], placement: LayerPlacement, hosts: HostLoads) -> list[HostWork]:
    able = np.flatnonzero(hosts.is_live & (placement.shared_local_expert > 0))
    if not len(able):
        return list(lost)
    host = int(able[hosts.load[able].argmin()])
    local = int(placement.shared_local_expert[host])
    return [HostWork(host, work.rows, work.row_index, torch.full_like(work.local_experts, local), work.weights) for work in lost]


def restrict(work: HostWork, is_wanted: Booleans) -> HostWork | None:
    """What is asked for the wanted rows of `work` only, is_wanted [R]; None when that is nothing."""
    if is_wanted.all():
        return work
    if not is_wanted.any():
        return None
    pairs = is_wanted[work.row_index.numpy()]
    row_index = (is_wanted.cumsum(dtype=np.int32) - 1)[work.row_index.numpy()[pairs]]
    local_experts, weights = work.local_experts.numpy()[pairs], work.weights.numpy()[pairs]
    return HostWork(work.host, *map(torch.from_numpy, (work.rows.numpy()[is_wanted], row_index, local_experts, weights)))


def experts_of(work: HostWork, placement: LayerPlacement) -> Integers:
    """[N]: the logical expert of each pair, -1 for the shared one."""
    local_experts = work.local_experts.numpy()
    first = np.searchsorted(placement.host_of_physical, work.host)
    is_shared = local_experts == placement.shared_local_expert[work.host]
    return np.where(is_shared, -1, placement.logical_of_physical[first + np.where(is_shared, 0, local_experts)])


def _state(hosts: HostLoads | None, placement: LayerPlacement) -> tuple[Booleans, Integers, CopyChoice]:
    hosts = hosts or HostLoads.all_idle(placement.num_hosts)
    return hosts.is_live, hosts.load, hosts.copy_choice


def _shared_hosts(tokens: Integers, host_of_pair: Integers, used: Booleans, num_hosts: int) -> Integers:
    """[T]: for every used token one of the hosts that receive it anyway, in turn; -1 where there is none or the token is not used."""
    receives = np.zeros((num_hosts, len(used)), dtype=np.bool_)
    receives[host_of_pair, tokens] = True
    number = receives.sum(axis=0)
    turn = np.arange(len(used)) % np.maximum(number, 1)
    chosen = (receives & (receives.cumsum(axis=0) == turn + 1)).argmax(axis=0)
    return np.where(used & (number > 0), chosen, -1)


def _by_host(
    tokens: Integers,
    physical: Integers,
    weights: Floats,
    num_tokens: int,
    placement: LayerPlacement,
    shared_host: Integers | None,
    shared: SharedWork | None,
) -> list[HostWork]:
    hosts_and_weights = None if shared is None or shared_host is None else (shared_host, shared.weights.numpy())
    found = dispatch_pairs((tokens, physical, weights), num_tokens, placement.places, hosts_and_weights)
    if found is not None:
        return _works(found)
    # Physical experts are numbered host by host, so one stable sort groups pairs by host and, within it, by expert.
    order = physical.argsort(kind="stable")
    tokens, physical, weights = tokens[order], physical[order], weights[order]
    local_experts = placement.local_expert_of_physical[physical]
    ends = np.searchsorted(placement.host_of_physical[physical], np.arange(placement.num_hosts + 1)).tolist()
    works = []
    for host, (start, end) in enumerate(pairwise(ends)):
        if start == end:
            continue
        own = tokens[start:end], local_experts[start:end], weights[start:end]
        if shared is not None and shared_host is not None:
            also = np.flatnonzero(shared_host == host)
            local = np.full(len(also), placement.shared_local_expert[host], dtype=np.int32)
            more = also, local, shared.weights.numpy()[also]
            own = np.concatenate([own[0], more[0]]), np.concatenate([own[1], more[1]]), np.concatenate([own[2], more[2]])
        works.append(_host_work(host, num_tokens, *own))
    return works


def _works(found: Dispatched) -> list[HostWork]:
    works, first_row, first_pair = [], 0, 0
    for host, (row_end, pair_end) in enumerate(zip(found.row_ends, found.pair_ends, strict=True)):
        if pair_end > first_pair:
            pairs = slice(first_pair, pair_end)
            arrays = found.rows[first_row:row_end], found.row_index[pairs], found.local_experts[pairs], found.weights[pairs]
            works.append(HostWork(host, *map(torch.from_numpy, arrays)))
        first_row, first_pair = row_end, pair_end
    return works


def _host_work(host: int, num_tokens: int, tokens: Integers, local_experts: Integers, weights: Floats) -> HostWork:
    """The pairs of one host; each of their tokens becomes one row."""
    sent = np.zeros(num_tokens, dtype=np.bool_)
    sent[tokens] = True
    row_index = (sent.cumsum(dtype=np.int32) - 1)[tokens]
    rows = np.flatnonzero(sent)
    return HostWork(host, *map(torch.from_numpy, (rows, row_index, local_experts, weights)))


def permute(hidden_states: torch.Tensor, rows: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """The given rows of [T, H], into `out` [R, H] of the same dtype if given; no copy when all rows are wanted and no `out` is."""
    if out is None and len(rows) == len(hidden_states):
        return hidden_states
    return torch.index_select(hidden_states, 0, rows, out=out)


def combine(answers: Sequence[tuple[torch.Tensor, torch.Tensor]], num_tokens: int, hidden_size: int) -> torch.Tensor:
    """Add the hosts' partial rows in float32, in the order given, so the sum does not depend on the order of arrival.

    answers: (rows [R] int64, partial [R, H] float32) per host. Returns [T, H] float32; zeros where nothing was computed.
    """
    if len(answers) == 1 and answers[0][0].numel() == num_tokens:
        return answers[0][1].clone()
    added = add_answers(answers, num_tokens, hidden_size)
    if added is not None:
        return added
    total = torch.zeros(num_tokens, hidden_size, dtype=torch.float32)
    for rows, partial in answers:
        total.index_add_(0, rows, partial)
    return total
