"""The kernels of a plan, measured on this machine with as many threads as a host has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from moeserve.api.tensors import FLOAT_DTYPES
from moeserve.checkpoints import LayerSource
from moeserve.config import PlacementConfig
from moeserve.experts import ROWS, Choice, ExpertShard, Shape, computed_in, measured

_QUANTIZED: Final = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def kernels(sources: Sequence[LayerSource], placement: PlacementConfig) -> Iterator[Table]:
    """A table for every shape of expert: microseconds per expert by number of rows, for every kernel that can compute it."""
    num_threads = max(1, int(placement.cpus_per_host))
    torch.set_num_threads(num_threads)
    seen = set()
    for source in sources:
        spec = source.spec
        rows_dtype = FLOAT_DTYPES[spec.dtype]
        dtype = rows_dtype if source.held_as == spec.dtype else _QUANTIZED.get(source.held_as)
        # Other quantized experts have groups with scales; there is one way to decode them.
        if spec.module is None and dtype is not None:
            channels = ExpertShard(0, 0, placement.tensor_parallel).span(spec.intermediate_size)
            width: int = channels.stop - channels.start
            rows_dtype = rows_dtype if dtype == rows_dtype else computed_in(rows_dtype)
            shape = Shape(dtype, rows_dtype, spec.activation, spec.hidden_size, width, num_threads)
            if shape not in seen:
                seen.add(shape)
                yield _table(shape, measured(shape, spec.kernel, spec.deterministic))


def _table(shape: Shape, choice: Choice) -> Table:
    table = Table("kernel", title=f"us per expert and rows: {shape}", title_justify="left", box=SIMPLE_HEAD)
    tried = ROWS[: min(map(len, choice.microseconds.values()), default=len(ROWS))]  # on a busy machine, not all
    for rows in tried:
        table.add_column(str(rows), justify="right")
    table.add_column("")
    for name, row in choice.microseconds.items():
        table.add_row(_label(name), *(f"{each:,.0f}" for each in row), _verdict(name, choice))
    if not choice.microseconds:
        table.add_row(str(choice.kernel), *("" for _ in tried), "as configured")
    return table


def _label(name: str) -> str:
    return f"torch, {name}" if name in ("linear", "transposed", "tiles") else name


def _verdict(name: str, choice: Choice) -> str:
    if choice.kernel is not None:
        return "chosen" if name == choice.kernel else ""
    of_form = [str(rows) for rows, form in zip(ROWS, choice.forms, strict=True) if form == name]
    return f"chosen for {', '.join(of_form)}" if of_form else ""
