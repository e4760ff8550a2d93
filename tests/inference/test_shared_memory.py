"""System shared memory: tensors by POSIX key, of one's own user only, and no crash whatever becomes of them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import grpc
import numpy as np
import pytest
import torch
import tritonclient.grpc as triton
import tritonclient.utils.shared_memory as shm
from tritonclient.utils import InferenceServerException

from moeserve.server.inference.messages import pb
from tests.inference.requests import METHOD, Caller, answered, declared, parameters, typed
from tests.support.engine import HIDDEN, X, echo_engine
from tests.support.servers import served

MODEL = "tiny/model.layers.5.mlp"
SIZE = X.numel() * 4
FOLDER = Path("/dev/shm")
NOBODY = 65534

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="POSIX shared memory is a folder on Linux only")


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    with served(echo_engine(), max_message_bytes=2**20) as (where, _, _):
        yield where


@pytest.fixture
def client(target: str) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(target) as made:
        yield made
        made.unregister_system_shared_memory()


@pytest.fixture
def key() -> Iterator[str]:
    """Of an object that is gone when the test ends."""
    name = f"moeserve-test-{uuid4().hex}"
    yield f"/{name}"
    with suppress(FileNotFoundError):
        (FOLDER / name).unlink()


@pytest.fixture
def region(client: triton.InferenceServerClient, key: str) -> Iterator[Any]:
    """X, and room for as much again, registered as "r"."""
    made = shm.create_shared_memory_region("r", key, 2 * SIZE)
    shm.set_shared_memory_region(made, [X.numpy()])
    client.register_system_shared_memory("r", key, 2 * SIZE)
    yield made
    with suppress(shm.SharedMemoryException, FileNotFoundError):
        shm.destroy_shared_memory_region(made)


def taken(nbytes: int = SIZE, offset: int = 0, name: str = "r", rows: int = 3) -> list[triton.InferInput]:
    made = triton.InferInput("hidden_states", [rows, HIDDEN], "FP32")
    made.set_shared_memory(name, nbytes, offset)
    return [made]


def sent() -> list[triton.InferInput]:
    made = triton.InferInput("hidden_states", [3, HIDDEN], "FP32")
    made.set_data_from_numpy(X.numpy())
    return [made]


def put(nbytes: int = SIZE, offset: int = SIZE, name: str = "r") -> list[triton.InferRequestedOutput]:
    made = triton.InferRequestedOutput("hidden_states")
    made.set_shared_memory(name, nbytes, offset)
    return [made]


def refused(call: Any, *args: Any, **kwargs: Any) -> tuple[str, str]:
    with pytest.raises(InferenceServerException) as caught:
        call(*args, **kwargs)
    return caught.value.status().removeprefix("StatusCode."), caught.value.message()


def test_rows_come_from_there_and_go_there(client: triton.InferenceServerClient, region: Any, key: str) -> None:
    in_messages = [triton.InferRequestedOutput(name) for name in ("requested", "dropped")]
    result = client.infer(MODEL, taken(), outputs=[*put(), *in_messages])
    answer = result.get_response()
    assert np.array_equal(shm.get_contents_as_numpy(region, np.float32, [3, HIDDEN], SIZE), X.numpy() + 1)
    written, *_ = answer.outputs
    assert (written.parameters["shared_memory_region"].string_param, written.parameters["shared_memory_offset"].int64_param) == ("r", SIZE)
    # Triton's clients, in C++ without a look at how many there are, take the contents at an output's position.
    assert (len(answer.raw_output_contents), answer.raw_output_contents[0]) == (3, b"")
    by_message = client.infer(MODEL, sent())
    assert all(np.array_equal(result.as_numpy(each.name()), by_message.as_numpy(each.name())) for each in in_messages)
    assert np.array_equal(client.infer(MODEL, taken()).as_numpy("hidden_states"), X.numpy() + 1)
    ids = triton.InferInput("topk_ids", [3, 1], "INT64")
    ids.set_data_from_numpy(np.zeros((3, 1), np.int64))
    weights = triton.InferInput("topk_weights", [3, 1], "FP32")
    weights.set_data_from_numpy(np.ones((3, 1), np.float32))
    assert np.array_equal(client.infer(MODEL, [ids, *taken(), weights]).as_numpy("hidden_states"), X.numpy() + 1)
    # What was unlinked is there for those who have it.
    (FOLDER / key[1:]).unlink()
    assert np.array_equal(client.infer(MODEL, taken()).as_numpy("hidden_states"), X.numpy() + 1)


def test_rows_without_numbers_beside_inputs_of_numbers(client: triton.InferenceServerClient, region: Any, target: str) -> None:
    """FP16 can only be sent raw, so that is how the answer comes, even if the mask was sent as numbers."""
    shm.set_shared_memory_region(region, [X.numpy().astype(np.float16)])
    rows = declared("hidden_states", X.half(), shared_memory_region="r", shared_memory_byte_size=SIZE // 2)
    request = pb.ModelInferRequest(model_name=MODEL, inputs=[rows, typed("used_token", torch.ones(3, dtype=torch.bool))])
    with grpc.insecure_channel(target) as channel:
        found = answered(Caller(channel).infer(request))
    assert torch.equal(found["hidden_states"], X.half() + 1)
    assert found["requested"].tolist() == [1, 2, 3, 4]


def test_regions_are_listed_and_forgotten(client: triton.InferenceServerClient, region: Any, key: str) -> None:
    client.register_system_shared_memory("second", key.removeprefix("/"), SIZE, offset=SIZE)
    found = client.get_system_shared_memory_status().regions
    assert {name: (each.key, each.offset, each.byte_size) for name, each in found.items()} == {
        "r": (key, 0, 2 * SIZE),
        "second": (key[1:], SIZE, SIZE),
    }
    assert list(client.get_system_shared_memory_status("second").regions) == ["second"]
    assert refused(client.get_system_shared_memory_status, "third")[0] == "NOT_FOUND"
    client.unregister_system_shared_memory("second")
    client.unregister_system_shared_memory("third")
    assert list(client.get_system_shared_memory_status().regions) == ["r"]
    client.unregister_system_shared_memory()
    assert not client.get_system_shared_memory_status().regions
    code, said = refused(client.infer, MODEL, taken())
    assert (code, "not registered" in said) == ("INVALID_ARGUMENT", True)


def test_what_is_not_in_the_region_is_refused(client: triton.InferenceServerClient, region: Any) -> None:
    for inputs, outputs in (
        (taken(offset=SIZE + 1), None),
        (taken(offset=2**63 - 1), None),
        (taken(nbytes=SIZE - 4), None),
        (taken(nbytes=3 * SIZE, rows=9), None),
        (taken(nbytes=2**20 + 64, rows=2**14 + 1), None),
        (taken(name="other"), None),
        (sent(), put(nbytes=SIZE - 1)),
        (sent(), put(offset=SIZE + 1)),
        (sent(), put(offset=2**62)),
        (sent(), put(name="other")),
    ):
        code, said = refused(client.infer, MODEL, inputs, outputs=outputs)
        assert (code, bool(said)) == ("INVALID_ARGUMENT", True)
    assert np.array_equal(shm.get_contents_as_numpy(region, np.float32, [3, HIDDEN], 0), X.numpy())


def test_a_region_that_is_cut_off_fails_the_call_and_nothing_else(client: triton.InferenceServerClient, region: Any, key: str) -> None:
    """A process that has it in its memory would die of SIGBUS; this one is in the same process as the service, and so would the test."""
    before = client.infer(MODEL, taken(), outputs=put())
    assert before.get_response().outputs
    os.truncate(FOLDER / key[1:], SIZE // 2)
    for inputs, outputs in ((taken(), None), (sent(), put())):
        code, said = refused(client.infer, MODEL, inputs, outputs=outputs)
        assert (code, "smaller than when it was registered" in said) == ("INVALID_ARGUMENT", True)
    assert (FOLDER / key[1:]).stat().st_size == SIZE // 2
    os.truncate(FOLDER / key[1:], 2 * SIZE)
    assert client.infer(MODEL, sent(), outputs=put()).get_response().outputs


def test_rows_that_are_alone_are_read_whatever_the_budget(key: str) -> None:
    (FOLDER / key[1:]).write_bytes(X.numpy().tobytes())
    with served(echo_engine(), max_queued_bytes=1) as (target, _, _), triton.InferenceServerClient(target) as client:
        client.register_system_shared_memory("r", key, SIZE)
        assert np.array_equal(client.infer(MODEL, taken()).as_numpy("hidden_states"), X.numpy() + 1)


@pytest.mark.parametrize("name", ["", "/", "/..", ".", "../etc/passwd", "/../../etc/passwd", "a/b", "/a/", "x" * 300, "\0", "no-such"])
def test_keys_name_objects_and_no_other_files(client: triton.InferenceServerClient, name: str) -> None:
    code, said = refused(client.register_system_shared_memory, "r", name, 16)
    assert (code, bool(said)) == ("INVALID_ARGUMENT", True)


def test_what_cannot_be_registered(client: triton.InferenceServerClient, region: Any, key: str, tmp_path: Path) -> None:
    other = f"moeserve-test-{uuid4().hex}"
    try:
        (FOLDER / other).symlink_to(tmp_path / "file")
        (tmp_path / "file").write_bytes(bytes(64))
        assert refused(client.register_system_shared_memory, "link", other, 16)[0] == "INVALID_ARGUMENT"
        (FOLDER / other).unlink()
        os.mkfifo(FOLDER / other)
        assert refused(client.register_system_shared_memory, "pipe", other, 16)[0] == "PERMISSION_DENIED"
        (FOLDER / other).unlink()
        (FOLDER / other).mkdir()
        assert refused(client.register_system_shared_memory, "folder", other, 16)[0] == "INVALID_ARGUMENT"
        (FOLDER / other).rmdir()
    finally:
        with suppress(OSError):
            (FOLDER / other).unlink()
    for name, nbytes, offset in (
        ("r", 16, 0),
        ("", 16, 0),
        ("n" * 256, 16, 0),
        ("new", 0, 0),
        ("new", 2 * SIZE + 1, 0),
        ("new", 1, 2 * SIZE),
    ):
        assert refused(client.register_system_shared_memory, name, key, nbytes, offset)[0] == "INVALID_ARGUMENT"
    for number in range(255):
        client.register_system_shared_memory(str(number), key, 16)
    code, said = refused(client.register_system_shared_memory, "one more", key, 16)
    assert (code, "256 regions" in said) == ("RESOURCE_EXHAUSTED", True)


@pytest.mark.parametrize(
    ("server", "why"), [({"shared_memory": "off"}, "server.shared_memory is 'off'"), ({"processes": 2}, "server.processes is 2")]
)
def test_it_can_be_switched_off(key: str, server: dict[str, Any], why: str) -> None:
    """And is, where the next connection of a client may reach a process that does not know its regions."""
    (FOLDER / key[1:]).write_bytes(bytes(SIZE))
    with served(echo_engine(), **server) as (target, _, _), triton.InferenceServerClient(target) as client:
        assert "system_shared_memory" not in client.get_server_metadata().extensions
        code, said = refused(client.register_system_shared_memory, "r", key, SIZE)
        assert (code, why in said) == ("PERMISSION_DENIED", True)
        assert refused(client.infer, MODEL, taken())[0] == "PERMISSION_DENIED"
        assert refused(client.get_system_shared_memory_status)[0] == "PERMISSION_DENIED"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user, too")
def test_other_users_objects_and_other_users_calls_are_refused(
    client: triton.InferenceServerClient, region: Any, key: str, target: str
) -> None:
    other = f"moeserve-test-{uuid4().hex}"
    try:
        (FOLDER / other).write_bytes(bytes(SIZE))
        os.chown(FOLDER / other, NOBODY, NOBODY)
        assert refused(client.register_system_shared_memory, "theirs", other, SIZE)[0] == "PERMISSION_DENIED"
    finally:
        (FOLDER / other).unlink()
    # Even what a caller of the right user has registered.
    where = parameters(shared_memory_region="r", shared_memory_byte_size=SIZE)
    rows = pb.ModelInferRequest.InferInputTensor(name="hidden_states", datatype="FP32", shape=X.shape, parameters=where)
    calls = {
        "ServerLive": pb.ServerLiveRequest(),
        "SystemSharedMemoryRegister": pb.SystemSharedMemoryRegisterRequest(name="mine", key=key, byte_size=16),
        "SystemSharedMemoryStatus": pb.SystemSharedMemoryStatusRequest(),
        "SystemSharedMemoryUnregister": pb.SystemSharedMemoryUnregisterRequest(),
        "ModelInfer": pb.ModelInferRequest(model_name=MODEL, inputs=[rows]),
    }
    arguments = [text for method, request in calls.items() for text in (METHOD + method, request.SerializeToString().hex())]
    command = [sys.executable, "-c", OTHER_USER, target, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout.splitlines() == ["OK"] + ["PERMISSION_DENIED"] * 4, done.stderr
    assert client.infer(MODEL, taken()).get_response().outputs


OTHER_USER = f"""
import os, sys
import grpc
grpc.insecure_channel(sys.argv[1]).close()  # everything is imported while files of Python can still be read
os.setgid({NOBODY}), os.setuid({NOBODY})
channel = grpc.insecure_channel(sys.argv[1])
for method, message in zip(sys.argv[2::2], sys.argv[3::2]):
    try:
        channel.unary_unary(method)(bytes.fromhex(message))
        print("OK")
    except grpc.RpcError as error:
        print(error.code().name)
"""
