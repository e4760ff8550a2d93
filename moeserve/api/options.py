"""The options of a request, for everyone who sends one.

T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

import torch


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
