"""A linear map whose answer to a row does not depend on the other rows. T rows, K input and O output channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from moeserve.kernels.memory import scratch
from moeserve.kernels.native import KERNELS, find_kernel, library
from moeserve.kernels.panels import TYPES, bias_to_panels, to_panels

_FLOAT32 = TYPES[torch.float32]


class InvariantLinear:
    """weight [O, K], bias [O] or None, in float32: every sum runs over all input channels in their order, in one accumulator.

    torch.nn.functional.linear adds up in another order when there are more rows or threads (Horace He and Thinking Machines Lab, Defeating
    nondeterminism in LLM inference, 2025). Without a compiled kernel, rows are multiplied one at a time.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._weight, self._bias = weight.float(), None if bias is None else bias.float()
        kernels = (find_kernel(name, _FLOAT32) for name in KERNELS)
        self._kernel = next((kernel for kernel in kernels if kernel is not None), None)
        if self._kernel is not None:
            self._panels = to_panels(self._weight).contiguous()
            self._panel_bias = None if self._bias is None else bias_to_panels(self._bias)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """[T, K] float32 -> [T, O] float32."""
        if self._kernel is None:
            return torch.cat([F.linear(row, self._weight, self._bias) for row in rows.split(1)]) if len(rows) else self._empty(rows)
        code, rows, out = library(), rows.contiguous(), self._empty(rows)
        assert code is not None, "a kernel was found in it"
        num_threads, (outputs, inputs) = torch.get_num_threads(), self._weight.shape
        space = scratch(code.linear_scratch_bytes(inputs, num_threads))
        code.run_linear(
            *(self._kernel, rows.data_ptr(), len(rows), inputs, self._panels.data_ptr()),
            *(None if self._panel_bias is None else self._panel_bias.data_ptr(), outputs, out.data_ptr(), space.data_ptr(), num_threads),
        )
        return out

    def _empty(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.new_empty(len(rows), len(self._weight))
