"""Any part of a weight reads as that part of its numbers, in every format; and stacks of experts in those that have them."""

from __future__ import annotations

import atexit
from functools import cache
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from moeserve.checkpoints.formats import Coded, scheme_of
from moeserve.checkpoints.safetensors_folder import SafetensorsFolder
from tests.checkpoints.published import PUBLISHED, Published, fp8_scaled

ROWS, COLUMNS, EXPERTS = 64, 160, 3
MODULE = "model.layers.0.mlp.experts.0.up_proj"


@cache
def stored(title: str) -> tuple[SafetensorsFolder, Tensor]:
    folder, published = Path(mkdtemp(prefix="parts-")), PUBLISHED[title]
    atexit.register(rmtree, folder)
    tensors, numbers = published.write(MODULE, (ROWS, COLUMNS), torch.Generator().manual_seed(5))
    save_file(tensors, folder / "model.safetensors")
    return SafetensorsFolder(folder, scheme_of(published.quantization_config, {})), numbers


def parts(size: int) -> st.SearchStrategy[slice]:
    return st.tuples(st.integers(0, size - 1), st.integers(1, size)).map(lambda cut: slice(cut[0], min(size, cut[0] + cut[1])))


@pytest.mark.parametrize("title", PUBLISHED)
@settings(max_examples=30, deadline=None)
@given(rows=parts(ROWS), columns=parts(COLUMNS))
def test_a_part_reads_as_that_part(title: str, rows: slice, columns: slice) -> None:
    files, numbers = stored(title)
    out = torch.empty(rows.stop - rows.start, columns.stop - columns.start)
    files.read_into(out, f"{MODULE}.weight", (ROWS, COLUMNS), rows=rows, columns=columns)
    torch.testing.assert_close(out, numbers[rows, columns], rtol=1e-6, atol=0)
    coded = files.read_coded(f"{MODULE}.weight", (ROWS, COLUMNS), None, rows, columns)
    assert isinstance(coded, Coded)
    assert coded.codes.shape == out.shape
    assert torch.equal(coded.numbers(), out)


STACKS: dict[str, tuple[Published, str]] = {
    # As transformers saves what it quantized: scales of blocks beside the stack.
    "fp8": (Published({"quant_method": "fp8", "weight_block_size": [32, 32]}, fp8_scaled("weight_scale_inv", (32, 32))), "_scale_inv"),
    # As Llama 4: [E, in, out], and a scale for each output channel.
    "fbgemm_fp8": (Published({"quant_method": "fbgemm_fp8"}, fp8_scaled("weight_scale", (10**6, 1))), "_scale"),
}


@pytest.mark.parametrize("title", STACKS)
def test_a_stack_of_experts(title: str, tmp_path: Path) -> None:
    published, suffix = STACKS[title]
    generator, name = torch.Generator().manual_seed(6), "model.layers.0.mlp.experts.gate_up_proj"
    written = [published.write("x", (ROWS, COLUMNS), generator) for _ in range(EXPERTS)]
    stacks = {part: torch.stack([tensors[f"x.weight{part}"] for tensors, _ in written]) for part in ("", suffix)}
    save_file({f"{name}{part}": tensor for part, tensor in stacks.items()}, tmp_path / "model.safetensors")
    files, rows, columns = SafetensorsFolder(tmp_path, scheme_of(published.quantization_config, {})), slice(5, 40), slice(33, 150)
    for expert, (_, numbers) in enumerate(written):
        out = torch.empty(35, 117)
        files.read_into(out, name, (EXPERTS, ROWS, COLUMNS), expert, rows, columns)
        assert torch.equal(out, numbers[rows, columns])
