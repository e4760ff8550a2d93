"""A host reads the experts it holds, and nothing else.

E experts, H hidden size, I intermediate size.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moeserve import CheckpointError, load_config
from moeserve.checkpoints import LayerSource, layer_sources
from tests.support.checkpoints_on_disk import CONFIG, MLP, expert_tensors, layer_tensors, write_folder
from tests.support.stacked import stacked, whole


def only_layer(folder: Path) -> LayerSource:
    (source,) = layer_sources(load_config(folder))
    return source


def test_a_shard_that_holds_other_experts_may_be_broken(tmp_path: Path) -> None:
    rest = {name: tensor for name, tensor in layer_tensors().items() if name not in expert_tensors(3)}
    write_folder(tmp_path, CONFIG, rest, expert_tensors(3))
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b"broken")
    source = only_layer(tmp_path)
    assert source.router().gate.shape == (4, 8)
    held = stacked(source.experts(whole([2, 0])))
    for slot, expert in enumerate([2, 0]):
        assert torch.equal(held.down_proj[slot], expert_tensors(expert)[f"{MLP}.experts.{expert}.down_proj.weight"])
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors is not a complete safetensors file"):
        source.experts(whole([3]))


def test_other_experts_of_the_same_file_may_be_spoilt(tmp_path: Path) -> None:
    gate_up_proj, down_proj = torch.randn(4, 12, 8), torch.randn(4, 8, 6)
    gate_up_proj[3] = float("nan")
    tensors = {f"{MLP}.experts.gate_up_proj": gate_up_proj, f"{MLP}.experts.down_proj": down_proj}
    source = only_layer(write_folder(tmp_path, CONFIG, tensors | {f"{MLP}.gate.weight": torch.zeros(4, 8)}))
    held = stacked(source.experts(whole([2, 0])))
    assert torch.equal(held.gate_up_proj, gate_up_proj[[2, 0]])
    assert torch.equal(held.down_proj, down_proj[[2, 0]])
    with pytest.raises(CheckpointError, match=r"experts\.gate_up_proj holds NaN or Inf"):
        source.experts(whole([3]))


def test_of_a_large_stack_only_the_slices_asked_for_are_in_memory(tmp_path: Path) -> None:
    """64 experts of 6 MiB in two files of holes, of which one expert is read: the pages of the rest are never touched."""
    num_experts, hidden, intermediate = 64, 1024, 512
    config = {**CONFIG, "hidden_size": hidden, "intermediate_size": intermediate, "num_local_experts": num_experts}
    shapes = {
        f"{MLP}.experts.gate_up_proj": [num_experts, 2 * intermediate, hidden],
        f"{MLP}.experts.down_proj": [num_experts, hidden, intermediate],
    }
    weight_map = {f"{MLP}.gate.weight": "gate.safetensors"}
    save_file({f"{MLP}.gate.weight": torch.zeros(num_experts, hidden)}, tmp_path / "gate.safetensors")
    for name, shape in shapes.items():
        weight_map[name] = f"{name}.safetensors"
        write_holes(tmp_path / weight_map[name], name, shape)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    source = only_layer(tmp_path)
    before = resident_bytes()
    (held,) = source.experts(whole([40]))
    assert held.nbytes == 6 * 2**20
    assert resident_bytes() - before < 96 * 2**20, "a quarter of the 384 MiB"


def write_holes(path: Path, name: str, shape: list[int]) -> None:
    """A float32 tensor of zeros that takes no room on disk."""
    num_bytes = 4 * torch.Size(shape).numel()
    header = json.dumps({name: {"dtype": "F32", "shape": shape, "data_offsets": [0, num_bytes]}}).encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + num_bytes)


def resident_bytes() -> int:
    """What this process has in memory, pages of mapped files included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
