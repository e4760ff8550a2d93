"""The part of a layer in the frontend: the gate, the mixing of a shared expert, experts without weights.

T tokens, H hidden size, K choices per token.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import cached_property
from math import isfinite

import torch

from moeserve.api.request import LayerRequest
from moeserve.api.tensors import dtype_name, is_finite
from moeserve.checkpoints import LayerSource, load_bank
from moeserve.errors import NonFiniteOutput
from moeserve.experts import ExpertBank
from moeserve.gating import Routing, keep_total
from moeserve.layer.dispatch import Dispatch, HostLoads, HostWork, SharedWork, permute, plan
from moeserve.placement import LayerPlacement

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Planned:
    """The dispatch of a batch to hosts, and the rest, which the head computes itself.

    topk_ids     [T, K] int64, topk_weights [T, K] float32 as they apply in the end, kept [T, K] bool
    dispatch     the hosts' work, and the tokens that no host sees
    shared       the weights of the shared expert, None = no token needs it
    """

    topk_ids: torch.Tensor
    topk_weights: torch.Tensor
    kept: torch.Tensor
    dispatch: Dispatch
    shared: SharedWork | None

    @property
    def works(self) -> list[HostWork]:
        """The work of each busy host."""
        return self.dispatch.works


class LayerHead:
    """The gate of one layer; routes, plans and finishes batches. The experts run in between, elsewhere."""

    def __init__(self, source: LayerSource) -> None:
        self.spec = source.spec
        self.router = source.router().invariant() if self.spec.deterministic else source.router()
        self._source = source
        mixer = source.mixer()
        self.mixer = mixer and replace(mixer, is_invariant=self.spec.deterministic)

    def plan(
        self,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        kept: torch.Tensor,
        hidden_states: torch.Tensor,
        used_token: torch.Tensor | None,
        placement: LayerPlacement,
        hosts: HostLoads | None = None,
        *,
        is_routed: bool = False,
    ) -> Planned:
        """topk_ids [T, K] int64, topk_weights [T, K] float32, kept [T, K] bool, hidden_states [T, H], used_token [T] bool or None.

        is_routed: the callers chose the experts themselves, and get these alone, without the shared one.
        """
        shared = None
        if self.mixer is not None and not is_routed:
            routed, share = self.mixer(hidden_states)
            topk_weights = topk_weights if routed is None else topk_weights * routed[:, None]
            shared = SharedWork(share, used_token)
        dispatch = plan(topk_ids, topk_weights, kept, placement, hosts, shared)
        return Planned(topk_ids, topk_weights, kept, dispatch, shared)

    def plan_with_fewer(
        self,
        planned: Planned,
        tokens: torch.Tensor,
        missing: torch.Tensor,
        placement: LayerPlacement,
        hosts: HostLoads | None,
        *,
        keeps_total: bool,
    ) -> Planned:
        """Some tokens [A] int64 of a plan anew, without their choices that are `missing` [A, K] bool.

        keeps_total: the remaining choices take over the weight of those that are missing.
        """
        kept = planned.kept[tokens] & ~missing
        ids, before = planned.topk_ids[tokens], planned.topk_weights[tokens] * planned.kept[tokens]
        weights = keep_total(before, kept) if keeps_total else before * kept
        shared = planned.shared
        if shared is not None:
            shared = SharedWork(shared.weights[tokens], None if shared.used_token is None else shared.used_token[tokens])
        return Planned(ids, weights, kept, plan(ids, weights, kept, placement, hosts, shared), shared)

    def finish(self, total: torch.Tensor, hidden_states: torch.Tensor, planned: Planned) -> torch.Tensor:
        """Adds the parts that need no host to the hosts' answers [T, H] float32."""
        if self.spec.identity_experts:
            first = self.spec.num_hosted_experts
            is_identity = planned.kept & (planned.topk_ids >= first) & (planned.topk_ids < first + self.spec.identity_experts)
            total = total + hidden_states.float() * (planned.topk_weights * is_identity).sum(dim=1, keepdim=True)
        alone = planned.dispatch.alone
        if planned.shared is not None and len(alone):
            answer = torch.empty(len(alone), self.spec.hidden_size, dtype=torch.float32)
            rows, local_experts = torch.arange(len(alone)), torch.zeros(len(alone), dtype=torch.int32)
            self._shared_expert.run(permute(hidden_states, alone), rows, local_experts, planned.shared.weights[alone], out=answer)
            total = total.index_add(0, alone, answer)
        return total

    def must_read(self, planned: Planned) -> bool:
        """Whether `finish` reads the shared expert first, which may take long."""
        return planned.shared is not None and "_shared_expert" not in vars(self) and planned.dispatch.alone.numel() > 0

    def rounded(self, total: torch.Tensor, request: LayerRequest, routing: Routing) -> torch.Tensor:
        """The output of `finish` for one request, [T, H] float32, in the dtype of the request.

        Raises NonFiniteOutput: a value that an expert could not compute makes every sum with it NaN or Inf, and rounding may make Inf too.
        """
        output = total.to(request.hidden_states.dtype)
        if is_finite(output):
            return output
        bad = ~output.isfinite()
        token = int(bad.any(dim=1).nonzero()[0])
        value = total[token][bad[token]][0].item()
        experts = sorted(routing.topk_ids[token][routing.kept[token]].tolist())
        makers = [f"expert{'s' * (len(experts) > 1)} {', '.join(map(str, experts))}"] if experts else []
        makers += ["the shared expert"] if self.mixer is not None and not request.is_routed else []
        what = f"does not fit {dtype_name(output.dtype)}" if isfinite(value) else "is not finite"
        raise NonFiniteOutput(
            f"layer {self.spec.name}: the output of token {token} {what} (it has {value:g}); computed by {' and '.join(makers)}"
        )

    @cached_property
    def _shared_expert(self) -> ExpertBank:
        """Loaded when the first token needs it: without drops, no token does."""
        bank = load_bank(self._source, [])
        log.info(
            "layer %s: the frontend loads the shared expert (%.1f MiB) for tokens that go to no host", self.spec.name, bank.nbytes / 2**20
        )
        return bank
