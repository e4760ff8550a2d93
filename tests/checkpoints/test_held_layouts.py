"""However experts lie on disk, what is held of any shard of one has the numbers that reading it in full gives.

E experts, H hidden size, I intermediate size.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from moeserve.checkpoints.formats import scheme_of
from moeserve.checkpoints.held import held_bytes, held_projections
from moeserve.checkpoints.layouts import Flat, Separate, Stacked, StoredPart
from moeserve.checkpoints.safetensors_folder import SafetensorsFolder
from moeserve.experts import ExpertShard, FeedForward
from tests.checkpoints.published import Published, fp8_scaled

EXPERTS, HIDDEN, INTERMEDIATE = 3, 64, 96
PREFIX = "model.layers.0.mlp"
BLOCKS = {"blocks": (32, 32), "wide blocks": (16, 64), "exponents for 32": (1, 32), "a row": (1, 10**6)}
#: a layout, and the shape of its gate and up, and of its down
LAYOUTS: dict[str, tuple[Separate | Stacked | Flat, tuple[int, ...], tuple[int, ...]]] = {
    "separate": (Separate(), (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)),
    "stacked": (Stacked(), (2 * INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)),
    "transposed": (Stacked(transposed=True), (HIDDEN, 2 * INTERMEDIATE), (INTERMEDIATE, HIDDEN)),
    "interleaved": (Stacked(interleaved=True), (2 * INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)),
    "both": (Stacked(transposed=True, interleaved=True), (HIDDEN, 2 * INTERMEDIATE), (INTERMEDIATE, HIDDEN)),
    "flat": (Flat("experts.w1", "experts.v1", "experts.w2"), (INTERMEDIATE, HIDDEN), (INTERMEDIATE, HIDDEN)),
}


def folder_of(
    layout: Separate | Stacked | Flat, gate_up: tuple[int, ...], down: tuple[int, ...], block: tuple[int, int], folder: Path
) -> SafetensorsFolder:
    """FP8 with a scale for each block of each matrix, as each layout has them."""
    settings = {"quant_method": "fp8", "weight_block_size": [min(size, 4096) for size in block]}
    published, generator = Published(settings, fp8_scaled("weight_scale_inv", block)), torch.Generator().manual_seed(4)
    tensors: dict[str, Tensor] = {}
    own_gates = [layout.gate_up] if isinstance(layout, Stacked) else [layout.gate, layout.up]
    names = [*((name, gate_up) for name in own_gates), (layout.down, down)]
    for name, shape in names:
        written = [published.write("x", (shape[0], shape[1]), generator)[0] for _ in range(EXPERTS)]
        for expert, stored in enumerate(written):
            for suffix in ("", "_scale_inv"):
                key, own = f"{PREFIX}.{name.format(expert=expert)}{suffix}", stored[f"x.weight{suffix}"]
                if isinstance(layout, Separate):
                    tensors[key] = own
                else:
                    join = torch.cat if isinstance(layout, Flat) else torch.stack
                    tensors[key] = join([each[f"x.weight{suffix}"].view(torch.uint8 if not suffix else torch.float32) for each in written])
                    tensors[key] = tensors[key].view(own.dtype)
    save_file(tensors, folder / "model.safetensors")
    return SafetensorsFolder(folder, scheme_of(published.quantization_config, {}))


@pytest.mark.parametrize("of", [1, 2, 5])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("title", LAYOUTS)
def test_held_is_what_is_read(title: str, block: str, of: int, tmp_path: Path) -> None:
    layout, gate_up, down = LAYOUTS[title]
    files = folder_of(layout, gate_up, down, BLOCKS[block], tmp_path)
    for number in range(of):
        shard = ExpertShard(1, number, of)
        part = StoredPart(files, PREFIX, EXPERTS, HIDDEN, INTERMEDIATE, 1, shard.span(INTERMEDIATE))
        width = part.channels.stop - part.channels.start
        full = FeedForward("swiglu", torch.empty(2 * width, HIDDEN), torch.empty(HIDDEN, width))
        layout.fill(full, part)
        held, said = held_projections(layout, part, None), held_bytes(layout, part, None)
        # Gate and up that alternate cannot be told apart where they share scales.
        shares = title in ("interleaved", "both") and BLOCKS[block][1 if title == "both" else 0] not in (1,)
        assert (held is None) == (said is None) == shares
        if held is None:
            continue
        assert torch.equal(torch.cat([matrix.dequantized() for matrix in held[0]]), full.gate_up_proj)
        assert torch.equal(held[1].dequantized(), full.down_proj)
        assert sum(matrix.nbytes for matrix in (*held[0], held[1])) == said
        rows = torch.randn(3, HIDDEN)
        for matrix in held[0]:
            torch.testing.assert_close(matrix.project(rows), rows @ matrix.dequantized().t())
