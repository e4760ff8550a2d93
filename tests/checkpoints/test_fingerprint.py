"""What makes the files of a checkpoint others, whatever its kind: all that the weights of a layer depend on, and nothing else."""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moeserve import MoELayer
from moeserve.checkpoints import Fingerprint, fingerprint_of, layer_fingerprints, layer_sources
from moeserve.config import ServiceConfig, load_config
from moeserve.errors import CheckpointError
from tests.checkpoints.deepspeed_folders import config as deepspeed_config
from tests.checkpoints.deepspeed_folders import model_of, write
from tests.checkpoints.quantized_folders import CONFIG as QUANTIZED
from tests.checkpoints.quantized_folders import PACKED, gates, weights
from tests.compat.modules import sequential
from tests.support.checkpoints_on_disk import CONFIG, expert_tensors, layer_tensors, write_folder


def one_file(folder: Path) -> dict[str, Any]:
    write_folder(folder, CONFIG, layer_tensors())
    return {"model": {"checkpoint": folder}}


def shards(folder: Path) -> dict[str, Any]:
    rest = {name: tensor for name, tensor in layer_tensors().items() if ".experts." not in name}
    write_folder(folder, CONFIG, rest, *map(expert_tensors, range(4)))
    return {"model": {"checkpoint": folder}}


def native(folder: Path) -> dict[str, Any]:
    shared = {"intermediate_size": 5, "mixing": "residual"}
    MoELayer(hidden_size=8, num_experts=4, intermediate_size=6, bias=True, shared_expert=shared).save(folder)
    return {"model": {"checkpoint": folder}}


def few_bits(folder: Path) -> dict[str, Any]:
    stored, _ = weights(PACKED.write)
    write_folder(folder, {**QUANTIZED, "quantization_config": PACKED.quantization_config}, {**gates(), **stored})
    return {"model": {"checkpoint": folder}}


def deepspeed(folder: Path) -> dict[str, Any]:
    write(folder, model_of(sequential(), use_residual=True))
    return deepspeed_config(folder, activation="gelu")


KINDS: list[Callable[[Path], dict[str, Any]]] = [one_file, shards, native, few_bits, deepspeed]


def taken(config: ServiceConfig) -> dict[str, Fingerprint]:
    return layer_fingerprints(layer_sources(config))


def put(content: bytes, file: Path) -> None:
    file.with_suffix(".new").write_bytes(content)
    os.replace(file.with_suffix(".new"), file)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("is_sampled", [False, True], ids=["whole", "sampled"])
def test_a_byte_of_any_file(
    kind: Callable[[Path], dict[str, Any]], is_sampled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_sampled:
        monkeypatch.setattr("moeserve.checkpoints.fingerprint._SMALL_BYTES", 0)
    folder = tmp_path / "step"
    config = load_config(kind(folder))
    (source, *_), was = layer_sources(config), taken(config)
    name = source.spec.name
    files = source.files_read()
    assert {file for file in folder.iterdir() if file.name != "latest"} >= set(files)
    for file in files:
        content = file.read_bytes()
        os.utime(file, (1, 1))
        put(content, file)
        assert taken(config) == was, "the same content, written again"
        if file.suffix != ".json":
            changed = bytearray(content)
            changed[len(content) // 2] ^= 1
            put(bytes(changed), file)
            assert was[name].difference(fingerprint_of(files)) == f"the numbers in {file} are others"
        put(content + b" ", file)
        if file.suffix == ".json":
            assert str(was[name].difference(fingerprint_of(files))).startswith(
                f"{file} has {len(content) + 1:,} bytes and had {len(content):,}"
            )
        put(content, file)
    assert taken(config) == was


def test_a_copy_elsewhere_differs_in_its_path_only(tmp_path: Path) -> None:
    was = taken(load_config(one_file(tmp_path / "one")))
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    for path in (tmp_path / "two").iterdir():
        os.utime(path, (1, 1))
    (before,), (after,) = was.values(), taken(load_config({"model": {"checkpoint": tmp_path / "two"}})).values()
    assert [(file.size, file.description, file.numbers) for file in before.files] == [
        (file.size, file.description, file.numbers) for file in after.files
    ]


def test_one_expert_of_a_stack_in_a_large_file(tmp_path: Path) -> None:
    """Only a thousandth of a large file is looked at, but something of every few megabytes of every tensor."""
    stack = torch.zeros(4, 1024, 1200)
    path = tmp_path / "model.safetensors"
    save_file({"a.experts.down_proj": stack, "a.gate.weight": torch.ones(4, 8)}, path)
    was = fingerprint_of([path])
    for tensor, change in (("a.experts.down_proj", lambda stack: stack[2].normal_()), ("a.gate.weight", lambda gate: gate.mul_(2))):
        tensors = load_file(path)
        change(tensors[tensor])
        save_file(tensors, tmp_path / "new")
        kept = path.read_bytes()
        os.replace(tmp_path / "new", path)
        assert was.difference(fingerprint_of([path])) == f"the numbers in {path} are others"
        put(kept, path)
        assert fingerprint_of([path]) == was


def test_every_small_expert_of_a_stack_in_a_large_file(tmp_path: Path) -> None:
    stack, path = torch.zeros(20, 512, 480), tmp_path / "model.safetensors"
    save_file({"nothing": torch.ones(0), "a.experts.down_proj": stack, "b": torch.ones(3)}, path)
    was = fingerprint_of([path])
    for expert in range(len(stack)):
        changed = stack.clone()
        changed[expert] = 1
        save_file({"nothing": torch.ones(0), "a.experts.down_proj": changed, "b": torch.ones(3)}, path)
        assert was.difference(fingerprint_of([path])) == f"the numbers in {path} are others", expert
    save_file({"nothing": torch.ones(0), "a.experts.down_proj": stack, "b": torch.ones(3)}, path)
    assert fingerprint_of([path]) == was


def test_names_types_and_files(tmp_path: Path) -> None:
    config = load_config(shards(tmp_path / "step"))
    was = taken(config)["model.layers.0.mlp"]
    part = tmp_path / "step" / "model-00002-of-00005.safetensors"
    tensors = load_file(part)
    save_file({name: tensor.view(torch.int32) for name, tensor in tensors.items()}, part)
    files = [Path(file.path) for file in was.files]
    assert was.difference(fingerprint_of(files)) == f"{part} describes other tensors"
    save_file(tensors, part)
    (tmp_path / "step" / "hf_quant_config.json").write_text("{}")
    now = fingerprint_of([*files, tmp_path / "step" / "hf_quant_config.json"])
    assert was.difference(now) == f"{tmp_path}/step/hf_quant_config.json is a file it did not have"
    assert now.difference(was) == f"{tmp_path}/step/hf_quant_config.json is not one of its files any more"


def test_entries_that_begin_far_behind_the_end_of_their_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are looked for within the file, which takes no time."""
    monkeypatch.setattr("moeserve.checkpoints.fingerprint._SMALL_BYTES", 0)
    path = tmp_path / "expert.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.pkl", b"x" * 100)
        archive.writestr("data/0", b"x" * 100)
        archive.infolist()[1].header_offset = 2**62
    was = fingerprint_of([path])
    put(path.read_bytes().replace(b"x" * 50, b"y" * 50, 1), path)
    assert was.difference(fingerprint_of([path])) == f"the numbers in {path} are others"


def test_a_file_of_a_zip_to_come(tmp_path: Path) -> None:
    """It says that more is needed to read it than there is."""
    path = tmp_path / "expert.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.pkl", b"x")
    content = path.read_bytes()
    needed = content.index(b"PK\1\2") + 6
    path.write_bytes(content[:needed] + b"\xff" + content[needed + 1 :])
    with pytest.raises(CheckpointError, match=r"expert\.pt cannot be read: zip file version 25\.5"):
        fingerprint_of([path])


def test_a_layer_of_a_seed_has_none() -> None:
    assert taken(load_config({"layers": [{"hidden_size": 4, "intermediate_size": 4, "num_experts": 2}]})) == {}
