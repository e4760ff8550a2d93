"""Any `nn.Module` as an expert. n rows, H hidden size."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from moeserve.errors import ConfigError


class ModuleExpert:
    """A module [n, H] -> [n, H] (or a tuple of which the first counts) in evaluation mode, computed in the dtype of its parameters."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self.module = module.to(dtype).eval().requires_grad_(False)
        self._dtype = dtype

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.module.state_dict(keep_vars=True).values())

    def to(self, device: torch.device) -> ModuleExpert:
        return ModuleExpert(copy.deepcopy(self.module).to(device), self._dtype) if device.type != "cpu" else self

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        # A copy, because a module may change what it is given, which may be the caller's own.
        answer = self.module(rows.to(self._dtype, copy=True))
        answer = answer[0] if isinstance(answer, tuple) else answer
        if answer.shape != rows.shape:
            raise ConfigError(
                f"expert {type(self.module).__name__} made {list(answer.shape)} of {list(rows.shape)}; allowed: the same shape"
            )
        # A copy, because the caller weighs the answer in place and a module may return what it was given.
        return torch.empty_like(answer, dtype=torch.float32).copy_(answer)


def module_class(path: str) -> type[nn.Module]:
    """The class (or function that makes a module) at "package.module:Name". Raises ConfigError naming the path."""
    module_name, _, name = path.partition(":")
    try:
        found = getattr(import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"expert {path!r} cannot be imported: {error}; its module must be installed or on PYTHONPATH") from None
    except Exception as error:
        raise ConfigError(f"expert {path!r} cannot be imported: {_sentence(error)}") from error
    if not callable(found):
        raise ConfigError(f"expert {path!r} is not a class of nn.Module")
    made: type[nn.Module] = found
    return made


def module_bytes(path: str, args: Mapping[str, Any], dtype: torch.dtype) -> int:
    """Bytes of its weights, known without making them."""
    return ModuleExpert(make_module(path, dict(args), "meta"), dtype).nbytes


def check_module(path: str, args: dict[str, Any], hidden_size: int) -> None:
    """Tries the module on rows without data. Raises ConfigError unless it keeps the shape of rows [n, H]."""
    rows = torch.empty(2, hidden_size, device="meta")
    module = make_module(path, args, "meta").eval()
    try:
        answer = module(rows)
    except NotImplementedError:
        return  # it does something that needs data: the first real row will tell
    except Exception as error:
        raise ConfigError(f"expert {path!r} made with {args} cannot take rows of hidden_size {hidden_size}: {_sentence(error)}") from error
    answer = answer[0] if isinstance(answer, tuple) and answer else answer
    if not isinstance(answer, torch.Tensor) or answer.shape != rows.shape:
        shape = list(answer.shape) if isinstance(answer, torch.Tensor) else type(answer).__name__
        raise ConfigError(f"expert {path!r} made with {args} makes {shape} of rows {list(rows.shape)}; it must keep the shape")


def make_module(path: str, args: dict[str, Any], device: str) -> nn.Module:
    """A new module of that class, on `device` ("meta" = sizes only). Raises ConfigError when it does not take `args`."""
    made = module_class(path)
    try:
        with torch.device(device):
            module = made(**args)
    except Exception as error:
        raise ConfigError(f"expert {path!r} cannot be made with {args}: {_sentence(error)}") from error
    if not isinstance(module, nn.Module):
        raise ConfigError(f"expert {path!r} makes a {type(module).__name__}; allowed: an nn.Module")
    if any(map(is_lazy, (*module.parameters(), *module.buffers()))):
        raise ConfigError(f"expert {path!r} made with {args} gets its sizes from its first rows; allowed: modules that are not lazy")
    return module


def _sentence(error: Exception) -> str:
    """The first line: what code that is not ours raises may be anything, and say nothing."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
