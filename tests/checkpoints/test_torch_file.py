"""Files of `torch.save`: their tensors are those that torch reads, and what cannot be one is refused by name."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from moeserve.checkpoints.torch_file import TorchFile
from moeserve.errors import CheckpointError

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)


def saved(folder: Path, **values: Any) -> TorchFile:
    torch.save(values, folder / "it.pt")
    return TorchFile(folder / "it.pt")


def read(file: TorchFile, name: str) -> Tensor:
    return file.tensor(name, file.items[name])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


@given(
    st.lists(st.integers(0, 5), max_size=4),
    st.sampled_from(DTYPES),
    st.sampled_from(["whole", "transposed", "a part", "a parameter", "with attributes"]),
    st.sampled_from([2, 4, 5]),
)
@settings(max_examples=80)
def test_tensors_are_those_that_torch_reads(folder: Path, shape: list[int], dtype: torch.dtype, kind: str, protocol: int) -> None:
    tensor = (torch.randn(shape) * 10).to(dtype)
    if kind == "transposed":
        tensor = tensor.permute(tuple(reversed(range(tensor.dim()))))
    elif kind == "a part":
        tensor = torch.cat([tensor.flatten(), tensor.flatten()])[tensor.numel() // 2 :]
    elif kind == "a parameter":
        tensor = nn.Parameter(tensor, requires_grad=False)
    elif kind == "with attributes":
        tensor.allreduce = False  # type: ignore[attr-defined]
    torch.save({"other": torch.ones(7), "it": tensor}, folder / "it.pt", pickle_protocol=protocol)
    file = TorchFile(folder / "it.pt")
    theirs = torch.load(folder / "it.pt", weights_only=False)["it"]
    ours = read(file, "it")
    assert (ours.dtype, ours.shape, ours.stride()) == (theirs.dtype, theirs.shape, theirs.stride())
    assert torch.equal(ours, theirs)
    assert torch.equal(read(file, "other"), torch.ones(7))


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (None, "it is a NoneType; expected a dense tensor"),
        ([torch.ones(2)], "it is a list; expected a dense tensor"),
        (torch.float16, "it is the name torch.float16; expected a dense tensor"),
        (Path("a"), r"it is an object made by pathlib.*; expected a dense tensor, and nothing was run"),
        (torch.ones(2, 2).to_sparse(), r"made by torch\._utils\._rebuild_sparse_tensor; expected a dense tensor"),
        (torch.ones(2).to(torch.float8_e4m3fn), r"made by torch\._utils\._rebuild_tensor_v\d|stored as"),
        (torch.ones(2, dtype=torch.complex64), r"stored as torch\.ComplexFloatStorage; supported: torch\.DoubleStorage"),
        (torch.ones(2, dtype=torch.complex64).conj().imag, "conjugated or negated"),
        (torch.ones(1).expand(1000), r"\[1000\] numbers from 0 to 0, of a storage of 1"),
    ],
)
def test_what_is_no_dense_tensor_harms_only_who_asks_for_it(value: Any, sentence: str, tmp_path: Path) -> None:
    file = saved(tmp_path, it=value, other=torch.ones(3))
    assert torch.equal(read(file, "other"), torch.ones(3))
    with pytest.raises(CheckpointError, match=sentence) as refusal:
        read(file, "it")
    assert str(file.path) in str(refusal.value) and "\n" not in str(refusal.value)


def rewritten(path: Path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> TorchFile:
    """The file with other contents, as another tool would write it: at places that are no multiple of anything."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, change(name, data))
    return TorchFile(path)


def test_a_file_that_another_tool_packed_again(tmp_path: Path) -> None:
    tensor = torch.randn(5, 3, dtype=torch.float64)
    file = rewritten(saved(tmp_path, it=tensor, odd=torch.ones(3, dtype=torch.int8)).path, lambda name, data: data)
    assert torch.equal(read(file, "it"), tensor)


OFFSET, SIZE = b"K\x00K\x05\x85", b"K\x05\x85"  # of a tensor of five numbers: from 0; shape (5,)


@pytest.mark.parametrize(
    ("found", "put"),
    [
        (OFFSET, b"K\x01K\x05\x85"),
        (SIZE, b"K\x06\x85"),
        (SIZE, b"J\xff\xff\xff\xff\x85"),
        (SIZE, b"N\x85"),
        (b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x007"),
        (b"X\x01\x00\x00\x000", b")" + b"2\x86" * 200),
        (SIZE, b"(" + b"\x8a\xff" * 1 + b"\x01" * 255 + b"2" * 99 + b"t"),
    ],
    ids=["offset", "size", "negative", "none", "no such storage", "no name of a storage", "huge"],
)
def test_numbers_beyond_a_storage_are_refused(found: bytes, put: bytes, tmp_path: Path) -> None:
    file = saved(tmp_path, it=torch.arange(5.0))
    with zipfile.ZipFile(file.path) as archive:
        data = archive.read("it/data.pkl")
    at = data.index(b"cpu") if found == SIZE else 0
    changed = data[:at] + data[at:].replace(found, put, 1)
    assert changed != data
    file = rewritten(file.path, lambda name, old: changed if name.endswith("data.pkl") else old)
    with pytest.raises(CheckpointError, match=r"tensor it is not in the file as it is described"):
        read(file, "it")


WRAPPED, INNER = b"ctorch._tensor\n_rebuild_from_type_v2\n", b"ctorch._utils\n_rebuild_parameter\nctorch\nTensor\n"


@pytest.mark.parametrize(
    "value",
    # the second is a list that has the whole in it
    [WRAPPED + b"(" + INNER + b"Kt" + b"tR", WRAPPED + b"(" + INNER + b"]\x94tR\x94h\x00(h\x01NNe0"],
    ids=["a number", "itself"],
)
def test_what_has_attributes_has_a_tuple_in_it(value: bytes, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "it.pt", "w") as archive:
        archive.writestr("it/data.pkl", b"\x80\x04}\x8c\x02it" + value + b"s.")
    file = TorchFile(tmp_path / "it.pt")
    with pytest.raises(CheckpointError, match=r"it is an object made by torch\._tensor\._rebuild_from_type_v2; expected a dense tensor"):
        read(file, "it")


def test_a_storage_that_is_too_short(tmp_path: Path) -> None:
    file = rewritten(saved(tmp_path, it=torch.arange(5.0)).path, lambda name, data: data[:-1] if name == "it/data/0" else data)
    with pytest.raises(CheckpointError, match="it/data/0 has 19 bytes of 20"):
        read(file, "it")


@pytest.mark.parametrize("change", [lambda path: os.truncate(path, 4096), lambda path: path.write_bytes(path.read_bytes())])
def test_a_file_that_is_written_again_while_it_is_used(change: Callable[[Path], Any], tmp_path: Path) -> None:
    """As by a trainer that saves to the folder that is served. A mapped file that was cut off would end this process."""
    file = saved(tmp_path, it=torch.ones(100_000))
    os.utime(file.path, (1, 1))
    file = TorchFile(file.path)
    change(file.path)
    with pytest.raises(CheckpointError, match="changed while the checkpoint was read"):
        read(file, "it")


def test_what_a_tensor_is_can_be_known_without_reading_it(tmp_path: Path) -> None:
    file = saved(tmp_path, it=torch.ones(3, 5, dtype=torch.bfloat16).T, no=None)
    found = file.tensor("it", file.items["it"], is_read=False)
    assert (found.device.type, found.dtype, found.shape) == ("meta", torch.bfloat16, (5, 3))
    with pytest.raises(CheckpointError, match="no is a NoneType"):
        file.tensor("no", file.items["no"], is_read=False)


def packed(path: Path) -> None:
    rewritten(path, lambda name, data: data, zipfile.ZIP_DEFLATED)


def big_endian(path: Path) -> None:
    rewritten(path, lambda name, data: b"big" if name.endswith("byteorder") else data)


def spoiled(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"X\x02\x00\x00\x00it", b"X\x02\x00\x00\x00at"))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda path: path.unlink(), "it.pt is missing"),
        (lambda path: path.write_bytes(b""), "is not a file of tensors: File is not a zip file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-40]), "is not a file of tensors"),
        (lambda path: torch.save({"it": torch.ones(2)}, path, _use_new_zipfile_serialization=False), "File is not a zip file"),
        (lambda path: zipfile.ZipFile(path, "w").close(), "There is no item named 'data.pkl'|data.pkl"),
        (packed, "its pickle is compressed"),
        (big_endian, "its numbers are big-endian"),
        (spoiled, "Bad CRC-32"),
        (lambda path: torch.save([1], path), "holds a list; expected names and tensors"),
        (lambda path: torch.save(Path(), path), "holds an object made by pathlib"),
    ],
)
def test_files_that_are_wrong(change: Callable[[Path], Any], sentence: str, tmp_path: Path) -> None:
    path = saved(tmp_path, it=torch.ones(2)).path
    with pytest.raises(CheckpointError, match=sentence):
        change(path)
        TorchFile(path)
