"""Which rows of a pass are padding: experts get rows alone, and only the model around them has the attention mask.

B sequences of S tokens, after P earlier ones in a cache; T = B * S rows.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from functools import cache
from typing import Any, Final, TypeVar
from weakref import WeakSet

import torch
from torch import nn

log = logging.getLogger(__name__)

Function = TypeVar("Function", bound=Callable[..., Any])
_disable: Final[Any] = torch.compiler.disable

#: [T] bool of the pass that this thread is in; None = every row is used
_used: Final[ContextVar[torch.Tensor | None]] = ContextVar("used rows", default=None)
_watched: Final[WeakSet[nn.Module]] = WeakSet()


def uncompiled(function: Function) -> Function:
    """It runs as it is where `torch.compile` compiles its caller."""
    same: Function = _disable(function)
    return same


def watch_padding(model: nn.Module, experts: Iterable[str]) -> None:
    """From now on, the attention mask of every pass through the models around these modules is noted for `used_rows`."""
    for around in {found for name in experts if (found := _around(model, name)) is not None} - set(_watched):
        around.register_forward_pre_hook(_note, with_kwargs=True)
        around.register_forward_hook(_leave, always_call=True)
        _watched.add(around)


def used_rows(num_rows: int) -> torch.Tensor | None:
    """[T] bool, false = padding, of the pass that this thread is in; None = every row is used, or these are not the rows of the pass."""
    used = _used.get()
    return used if used is not None and len(used) == num_rows else None


def forget_padding() -> None:
    """After a pass that was broken off where no hook is called: inside compiled code, and by Ctrl-C."""
    _used.set(None)


@uncompiled
def _note(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    _used.set(_used_of(dict(zip(_parameters(type(model).forward), args, strict=False)) | kwargs))


@uncompiled
def _leave(model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    forget_padding()


def _used_of(given: Mapping[str, Any]) -> torch.Tensor | None:
    """Arguments of a model -> [T] bool."""
    mask, tokens = given.get("attention_mask"), given.get("input_ids")
    tokens = given.get("inputs_embeds") if tokens is None else tokens
    if mask is None or tokens is None:
        return None
    past = given.get("past_key_values")
    shape = len(tokens), tokens.shape[1] + (0 if past is None else past.get_seq_length())
    if not isinstance(mask, torch.Tensor) or mask.shape != shape:
        _say_ignored(f"{mask.dim()} dimensions" if isinstance(mask, torch.Tensor) else type(mask).__name__)
        return None
    used = mask[:, -tokens.shape[1] :].reshape(-1) != 0
    return None if used.all() else used


@cache
def _say_ignored(what: str) -> None:
    log.info("an attention mask of %s is not [B, P + S]: it does not say which rows are padding, and experts compute all rows", what)


def _around(model: nn.Module, name: str) -> nn.Module | None:
    """The innermost module around another one that is called with tokens and an attention mask; None = there is none."""
    while name:
        name = name.rpartition(".")[0]
        around = model.get_submodule(name)
        parameters = _parameters(type(around).forward)
        if "attention_mask" in parameters and not {"input_ids", "inputs_embeds"}.isdisjoint(parameters):
            return around
    return None


@cache
def _parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]
