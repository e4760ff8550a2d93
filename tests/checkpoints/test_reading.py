"""What a host reads: its own slices of its own experts, once, in hardly more memory than they take, from a folder that keeps still.

E experts, H hidden size, I intermediate size.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from moeserve import CheckpointError, MoELayer, load_config
from moeserve.checkpoints import bank_bytes, layer_sources, load_bank
from moeserve.checkpoints.families import family_of
from moeserve.checkpoints.huggingface import HuggingFaceLayer
from moeserve.experts import ExpertShard
from moeserve.placement import plan_placement
from tests.checkpoints.saved import rewritten, saved, stacked, tensors_of
from tests.support.checkpoints_on_disk import CONFIG, MLP, expert_tensors, layer_tensors, write_folder


def only_layer(family: str, folder: Path) -> HuggingFaceLayer:
    (source,) = layer_sources(load_config({"model": {"checkpoint": folder, "layers": [family_of(family).layer_name.format(index=1)]}}))
    assert isinstance(source, HuggingFaceLayer)
    return source


PLACEMENTS: Mapping[str, dict[str, int]] = {
    "three hosts": {"num_hosts": 3},
    "halves": {"num_hosts": 2, "tensor_parallel": 2},
    "thirds of experts on six hosts": {"num_hosts": 6, "tensor_parallel": 3},
    "two copies": {"num_hosts": 4, "copies": 2},
}


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe, stacked", "deepseek_v3", "llama4_text", "dbrx", "gpt_oss"])
def test_a_host_reads_what_it_holds_and_not_a_byte_more(family: str, placement: str, tmp_path: Path) -> None:
    """float32 is stored and held, so that the bytes read are the bytes held."""
    family, _, layout = family.partition(", ")
    folder = saved(family)
    if layout:
        folder = rewritten(folder, tmp_path, stacked(tensors_of(folder)))
    config = load_config({"model": {"checkpoint": folder}, "placement": PLACEMENTS[placement]})
    placed = plan_placement([only_layer(family, folder).spec], config.placement)
    for host in range(placed.num_hosts):
        source, held = only_layer(family, folder), placed.layers[0].shards_on(host)
        bank = load_bank(source, held)
        # The bias of the second projection is read and set to zero by shards that do not add it.
        assert source.files.bytes_read == bank.nbytes == bank_bytes(source, held)


def test_planning_reads_nothing(tmp_path: Path) -> None:
    source = only_layer("mixtral", saved("mixtral"))
    assert source.nbytes(ExpertShard(0)) > 0
    assert source.files.bytes_read == 0


def test_a_line_in_the_log_when_a_layer_is_read(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "moeserve")
    only_layer("mixtral", saved("mixtral")).experts([ExpertShard(expert) for expert in range(3)])
    # A service of another test may still have something to say.
    (line,) = (record.getMessage() for record in caplog.records if record.name == "moeserve.checkpoints.huggingface")
    assert line.startswith("layer model.layers.1.mlp: 3 of 3 experts, 0.0 MiB, ")


def replaced(path: Path) -> None:
    """By another file of the same size, as a download does that renames what it has finished."""
    other = path.with_suffix(".new")
    other.write_bytes(path.read_bytes())
    os.replace(other, path)


def written_to(path: Path) -> None:
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\0\0")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 8)


@pytest.mark.parametrize("change", [replaced, written_to, cut, Path.unlink], ids=lambda change: change.__name__)
def test_a_file_that_changes_after_its_header_was_read(change: Callable[[Path], None], tmp_path: Path) -> None:
    write_folder(tmp_path, CONFIG, layer_tensors())
    (source,) = layer_sources(load_config(tmp_path))
    source.router()
    change(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors (changed while|cannot be read any more)"):
        source.experts([ExpertShard(0)])


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_a_pickle_is_never_loaded(name: str, tmp_path: Path) -> None:
    path = write_folder(tmp_path, CONFIG, layer_tensors()) / "model.safetensors"
    torch.save(layer_tensors(), tmp_path / name)
    path.unlink()
    with pytest.raises(CheckpointError, match=f"; {name} is a pickle, which is never loaded: save the model as safetensors"):
        MoELayer.from_checkpoint(tmp_path)
    torch.save(layer_tensors(), path)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a complete safetensors file"):
        MoELayer.from_checkpoint(tmp_path)


@pytest.mark.parametrize("file", ["pytorch_model-00001.bin", "../model.safetensors", "/etc/passwd"])
def test_an_index_that_leads_elsewhere(file: str, tmp_path: Path) -> None:
    path = write_folder(tmp_path, CONFIG, layer_tensors(), expert_tensors(0)) / "model.safetensors.index.json"
    path.write_text(path.read_text().replace("model-00002-of-00002.safetensors", file))
    with pytest.raises(CheckpointError, match=r"names the file .*; allowed: safetensors files in the same folder"):
        MoELayer.from_checkpoint(tmp_path)


# 8 experts of 24 MiB as stored: H = 1024, I = 2048, float32 on disk.
PEAK = """
import sys, torch, gc
from moeserve import load_config
from moeserve.checkpoints import layer_sources, load_bank
from moeserve.experts import ExpertShard

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

(source,) = layer_sources(load_config({"model": {"checkpoint": sys.argv[1], "dtype": sys.argv[2]}}))
source.experts([ExpertShard(0, 0, 64)])  # threads and allocators are there from now on
before = peak()
bank = load_bank(source, [ExpertShard(expert) for expert in range(8)])
print(peak() - before, bank.nbytes)
"""


@pytest.mark.parametrize(("family", "dtype"), [("mixtral", "float32"), ("llama4_text", "bfloat16")])
def test_loading_takes_hardly_more_memory_than_the_weights(family: str, dtype: str, large: Callable[[str], Path]) -> None:
    done = subprocess.run([sys.executable, "-c", PEAK, str(large(family)), dtype], capture_output=True, text=True, check=True)
    taken, nbytes = map(int, done.stdout.split())
    assert nbytes > 95e6
    # Beside what is held: one expert as it is stored, and once per process what kernels are chosen with, most of it code of math libraries.
    assert taken < nbytes * 9 / 8 + 2**26


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """One layer, one tensor per expert (Mixtral), or stacked and transposed (Llama 4)."""
    hidden, intermediate, experts = 1024, 2048, 8
    config = {**CONFIG, "hidden_size": hidden, "intermediate_size": intermediate, "num_local_experts": experts}
    up_down = {"gate_proj": (intermediate, hidden), "up_proj": (intermediate, hidden), "down_proj": (hidden, intermediate)}
    prefix = "model.layers.0.feed_forward"
    shapes = {
        "mixtral": {f"{MLP}.experts.{expert}.{name}.weight": up_down[name] for expert in range(experts) for name in up_down},
        "llama4_text": {
            f"{prefix}.experts.gate_up_proj": (experts, hidden, 2 * intermediate),
            f"{prefix}.experts.down_proj": (experts, intermediate, hidden),
            **{f"{prefix}.shared_expert.{name}.weight": shape for name, shape in up_down.items()},
        },
    }
    gates = {"mixtral": f"{MLP}.gate.weight", "llama4_text": f"{prefix}.router.weight"}

    def folder(family: str) -> Path:
        path = tmp_path_factory.getbasetemp() / f"large-{family}"
        if not path.exists():
            tensors = {name: torch.ones(shape) for name, shape in shapes[family].items()}
            write_folder(path, {**config, "model_type": family}, tensors | {gates[family]: torch.zeros(experts, hidden)})
        return path

    return folder
