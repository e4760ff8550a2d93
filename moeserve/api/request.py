"""One token batch for one layer, and the only place where it is checked.

A new field of requests is added in three places before the one that uses it: the message, `RequestOptions` and `RequestFields` here, and
`validate`. Clients, wire and server pass on all fields.

T tokens, H hidden size, E experts, K choices per token.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypedDict

import torch

from moeserve.api.call_trace import CallTrace
from moeserve.api.tensors import FLOAT_DTYPES, dtype_name, is_finite, without_unused
from moeserve.errors import InvalidRequest

if TYPE_CHECKING:  # clients do without the configuration and pydantic; services import it when they check
    from moeserve.config import GatingOverrides, LayerSpec

_FLOATS = FLOAT_DTYPES.values()
#: in topk_ids: no expert
NO_CHOICE = -1


class RequestOptions(TypedDict, total=False):
    """`RequestFields` as keyword arguments of every way to send a request."""

    token_ids: torch.Tensor | None
    capacity_factor: float | None
    noise: str | None
    seed: int | None


@dataclass(frozen=True, kw_only=True)
class RequestFields:
    """The options of a request, beside its tokens and their routing.

    token_ids [T] int, 0..2^32-1, for layers that route by them; capacity_factor, noise and seed instead of the layer's own.
    """

    token_ids: torch.Tensor | None = None
    capacity_factor: float | None = None
    noise: str | None = None
    seed: int | None = None


@dataclass
class BatchStart:
    """When the batch of a request began, on the monotonic clock; 0 = it has not. Of requests that have one, one of a batch is the first."""

    at_s: float = 0.0
    is_first: bool = False


@dataclass(frozen=True)
class LayerRequest(RequestFields):
    """The fields of one request; with topk_ids, the caller has routed.

    hidden_states [T, H] float; used_token [T] bool; topk_ids [T, K] int and topk_weights [T, K] float, id -1 = no choice.
    The rows of unused tokens have no meaning, nor has the weight of no choice.
    `deadline` is a time on this machine's monotonic clock, in seconds. Requests of one `caller` share what is fair for one.
    `begun` is filled in, and `trace` records where the time goes, for who wants to know.
    """

    hidden_states: torch.Tensor
    used_token: torch.Tensor | None = None
    topk_ids: torch.Tensor | None = None
    topk_weights: torch.Tensor | None = None
    return_routing: bool = False
    deadline: float | None = None
    caller: str = ""
    begun: BatchStart | None = None
    trace: CallTrace | None = None

    @property
    def num_tokens(self) -> int:
        """The number of tokens, used or not: T."""
        return self.hidden_states.shape[0]

    @property
    def sizes(self) -> list[int]:
        """The tokens per request, as a batch has them."""
        return [self.num_tokens]

    @property
    def is_routed(self) -> bool:
        """Whether the caller has chosen the experts."""
        return self.topk_ids is not None

    @property
    def overrides(self) -> GatingOverrides:
        """The request's overrides of the layer's gate."""
        from moeserve.config import GatingOverrides  # noqa: PLC0415

        return GatingOverrides(self.capacity_factor, self.noise, self.seed)


def validate(request: LayerRequest, spec: LayerSpec, max_tokens: int) -> LayerRequest:
    """`request` as the layer runs it, with neutral values in unused rows. Raises InvalidRequest, naming the field.

    Such rows hold 0, and -1 in topk_ids; topk_weights are 0 where there is no choice.
    """
    _validate_rows(request, spec, max_tokens)
    _validate_kinds_of_choices(request, spec)
    _validate_kind_of_token_ids(request, spec)
    request = _without_what_does_not_count(request)
    _require_finite(request.hidden_states, "hidden_states")
    _validate_choices(request, spec)
    _validate_token_ids(request)
    _validate_overrides(request, spec)
    return request


def _without_what_does_not_count(request: LayerRequest) -> LayerRequest:
    used, token_ids = request.used_token, request.token_ids
    token_ids = None if token_ids is None else without_unused(token_ids, used)
    if request.topk_ids is None or request.topk_weights is None:
        if used is None:
            return request
        return replace(request, hidden_states=without_unused(request.hidden_states, used), token_ids=token_ids)
    topk_ids = without_unused(request.topk_ids, used, NO_CHOICE)
    is_choice = topk_ids != NO_CHOICE
    if is_choice.all():
        return request
    return replace(
        request,
        hidden_states=without_unused(request.hidden_states, is_choice.any(dim=1)),  # no expert reads a row without a choice
        topk_ids=topk_ids,
        topk_weights=request.topk_weights.masked_fill(~is_choice, 0),
        token_ids=token_ids,
    )


def _validate_rows(request: LayerRequest, spec: LayerSpec, max_tokens: int) -> None:
    hidden_states = request.hidden_states
    _require_dtype(hidden_states, _FLOATS, "hidden_states")
    if hidden_states.dim() != 2 or hidden_states.shape[1] != spec.hidden_size:
        raise InvalidRequest(
            f"hidden_states has shape {list(hidden_states.shape)}; layer {spec.name} takes [tokens, {spec.hidden_size}]",
            "hidden_states",
        )
    if request.num_tokens > max_tokens:
        raise InvalidRequest(
            f"hidden_states has {request.num_tokens} tokens; at most {max_tokens} are allowed in one request", "hidden_states"
        )
    used_token = request.used_token
    if used_token is not None and (used_token.dtype != torch.bool or list(used_token.shape) != [request.num_tokens]):
        raise InvalidRequest(
            f"used_token must be bool of shape [{request.num_tokens}], got {dtype_name(used_token.dtype)} {list(used_token.shape)}",
            "used_token",
        )


def _validate_kinds_of_choices(request: LayerRequest, spec: LayerSpec) -> None:
    topk_ids, topk_weights = request.topk_ids, request.topk_weights
    if topk_ids is None and topk_weights is None:
        if spec.gating.routing == "caller":
            raise InvalidRequest(f"topk_ids is required: layer {spec.name} is routed by its callers", "topk_ids")
        return
    if topk_ids is None or topk_weights is None:
        missing = "topk_ids" if topk_ids is None else "topk_weights"
        raise InvalidRequest(f"topk_ids and topk_weights must be given together; {missing} is not given", missing)
    _require_dtype(topk_ids, (torch.int64, torch.int32), "topk_ids")
    _require_dtype(topk_weights, _FLOATS, "topk_weights")
    num_tokens, num_experts = request.num_tokens, spec.num_experts
    top_k = topk_ids.shape[1] if topk_ids.dim() == 2 else 0
    if topk_ids.dim() != 2 or topk_ids.shape[0] != num_tokens or not 1 <= top_k <= num_experts or topk_weights.shape != topk_ids.shape:
        raise InvalidRequest(
            f"topk_ids and topk_weights must both be [{num_tokens}, K] with K in 1..{num_experts}, "
            f"got {list(topk_ids.shape)} and {list(topk_weights.shape)}",
            "topk_ids",
        )


def _validate_choices(request: LayerRequest, spec: LayerSpec) -> None:
    topk_ids, topk_weights = request.topk_ids, request.topk_weights
    if topk_ids is None or topk_weights is None:
        return
    bad = (topk_ids < NO_CHOICE) | (topk_ids >= spec.num_experts)
    if bad.any():
        token, choice = bad.nonzero()[0].tolist()
        raise InvalidRequest(
            f"topk_ids[{token}, {choice}] is {int(topk_ids[token, choice])}; layer {spec.name} has experts 0..{spec.num_experts - 1}, "
            f"and {NO_CHOICE} is no choice",
            "topk_ids",
        )
    ordered = topk_ids.sort(dim=1).values
    twice = ordered[:, 1:] == ordered[:, :-1]
    if twice.any() and (twice := twice & (ordered[:, 1:] != NO_CHOICE)).any():
        token, place = twice.nonzero()[0].tolist()
        raise InvalidRequest(f"topk_ids[{token}] names an expert twice: {int(ordered[token, place])}", "topk_ids")
    _require_finite(topk_weights, "topk_weights")


def _validate_kind_of_token_ids(request: LayerRequest, spec: LayerSpec) -> None:
    from moeserve.config import BY_TOKEN_ID  # noqa: PLC0415

    token_ids = request.token_ids
    if token_ids is None:
        if spec.gating.routing in BY_TOKEN_ID and not request.is_routed:
            raise InvalidRequest(f"token_ids is required: layer {spec.name} routes by the token id", "token_ids")
        return
    _require_dtype(token_ids, (torch.int64, torch.int32), "token_ids")
    if list(token_ids.shape) != [request.num_tokens]:
        raise InvalidRequest(f"token_ids has shape {list(token_ids.shape)}; expected [{request.num_tokens}]", "token_ids")


def _validate_token_ids(request: LayerRequest) -> None:
    token_ids = request.token_ids
    if token_ids is None:
        return
    bad = (token_ids < 0) | (token_ids.long() >= 2**32)  # compared with an int32 tensor, 2**32 would wrap around to 0
    if bad.any():
        token = int(bad.nonzero()[0])
        raise InvalidRequest(f"token_ids[{token}] is {int(token_ids[token])}; allowed: 0..{2**32 - 1}", "token_ids")


def _validate_overrides(request: LayerRequest, spec: LayerSpec) -> None:
    from moeserve.config import override  # noqa: PLC0415

    override(spec.gating, request.overrides)
    if request.is_routed and request.noise is not None:
        raise InvalidRequest("noise has no meaning in a request that is routed by its caller (topk_ids is given)", "noise")


def _require_dtype(tensor: torch.Tensor, allowed: Collection[torch.dtype], field: str) -> None:
    if tensor.dtype not in allowed:
        raise InvalidRequest(f"{field} is {dtype_name(tensor.dtype)}; allowed: {', '.join(map(dtype_name, allowed))}", field)


def _require_finite(tensor: torch.Tensor, field: str) -> None:
    if is_finite(tensor):
        return
    token, column = (~tensor.isfinite()).nonzero()[0].tolist()
    value = tensor[token, column].item()
    raise InvalidRequest(f"{field} of token {token} is not finite (NaN or Inf): {field}[{token}, {column}] is {value}", field)
