"""Targets, tokens and timeouts as people write and paste them: each works, or is refused in one sentence that names it."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moeserve import errors, load_model
from moeserve.addresses import parse_target
from moeserve.cli.app import main
from moeserve.client import AdminClient, AsyncClient, Client, ControlClient, WireRequest
from moeserve.compat.deepspeed import MoE
from moeserve.engines.hf import connect_experts
from tests.client.calls import Calls
from tests.support.engine import FakeEngine, X
from tests.support.servers import served

BAD_TARGETS = {
    "": "it is empty",
    " \n": "it is empty",
    "127.0.0.1": "it has no port",
    "localhost": "it has no port",
    "[::1]": "it has no port",
    "::1": "an IPv6 address needs brackets, with its port after them",
    "::1:50051": "an IPv6 address needs brackets, with its port after them",
    "[::1:50051": "it has no port",
    "[127.0.0.1]:50051": "its host is '[127.0.0.1]', neither a name nor an address",
    ":50051": "its host is '', neither a name nor an address",
    "me@moe.example:50051": "its host is 'me@moe.example', neither a name nor an address",
    "moe..example:50051": "its host is 'moe..example', neither a name nor an address",
    "m" * 64 + ".example:50051": "its host is 'mmm",
    "moe.example:0": "its port is '0', not a number from 1 to 65535",
    "moe.example:70000": "its port is '70000', not a number",
    "moe.example:-1": "its port is '-1', not a number",
    "moe.example:": "its port is '', not a number",
    "moe.example:grpc": "its port is 'grpc', not a number",
    "moe.example:٥٠": "its port is '٥٠', not a number",
    "moe.example:50051/": "its port is '50051/', not a number",
    "moe.example:" + "9" * 10_000: "its port is '99999",
    "127.0.0.1:1,127.0.0.2:1": "its host is '127.0.0.1:1,127.0.0.2', neither a name nor an address",
    "ready 127.0.0.1:50051": "it has spaces in it",
    "http://127.0.0.1:9464/metrics": "http:// does not belong there",
    "https://moe.example:50051": "https:// does not belong there",
    "grpc://moe.example:50051": "grpc:// does not belong there",
    "dns:///moe.example": "it has no port",
    "ipv4:127.0.0.1:1,127.0.0.2": "it has no port",
    "unix:": "it names nothing",
}


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize(("target", "fault"), BAD_TARGETS.items())
def test_a_target_that_cannot_be_is_refused_at_once(kind: type[Client | AsyncClient], target: str, fault: str) -> None:
    with pytest.raises(errors.ConfigError) as caught:
        kind(target)
    said = str(caught.value)
    assert said.startswith(f"target is {target!r}"[:100])
    assert f": {fault}" in said and "; allowed: host:port, as in 127.0.0.1:50051 or [::1]:50051" in said
    assert len(said) < 500 and "\n" not in said


@pytest.mark.parametrize("target", [None, 50051, b"127.0.0.1:50051", Path("127.0.0.1:50051"), ("127.0.0.1", 50051)])
def test_a_target_is_text(target: Any) -> None:
    for make in (
        lambda: Client(target),
        lambda: AsyncClient(target),
        lambda: AdminClient(target, "token"),
        lambda: ControlClient(target, "token"),
        lambda: connect_experts(torch.nn.Linear(1, 1), target),
        lambda: load_model("nowhere", target),
        *([lambda: MoE(8, torch.nn.Linear(8, 8), 4, target=target)] if target is not None else []),
    ):
        with pytest.raises(errors.ConfigError, match=r"^target is .*; allowed: host:port") as caught:
            make()
        assert repr(target) in str(caught.value)


@pytest.mark.parametrize("written", ["{}", " {}\r\n", "\t{}", "dns:{}", "dns:///{}", "ipv4:{}", "ipv4:{0},{0}"])
async def test_a_target_may_be_written_so(connect: Callable[..., Calls], target: str, written: str) -> None:
    assert (await connect(written.format(target)).forward(X)).hidden_states.tolist() == X.tolist()


@pytest.mark.parametrize("host", ["::1", "0.0.0.0", "::", "localhost", "127.3.2.1", "[::1]"])
async def test_addresses_of_every_family(engine: FakeEngine, connect: Callable[..., Calls], host: str) -> None:
    try:
        with served(engine, host=host, insecure=True) as (target, _, _):
            assert (await connect(target).forward(X)).hidden_states.tolist() == X.tolist()
    except errors.ConfigError as error:
        pytest.skip(str(error))  # without IPv6


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    (tmp_path / "token").write_text("secret\n")
    return tmp_path / "token"


@pytest.mark.parametrize("written", ["secret", "secret\n", "secret \r\n", "\tsecret\n\n", "\ufeffsecret\r\n", b"secret\n"])
def test_a_token_may_have_space_around_it(engine: FakeEngine, token_file: Path, written: Any) -> None:
    with served(engine, auth_token_file=token_file) as (target, _, _):
        with Client(target, token=written) as client:
            client.forward(X)
        token_file.write_bytes(written.encode() if isinstance(written, str) else written)
        assert main(["top", target, "--once", "--token-file", str(token_file)]) == 0


@pytest.mark.parametrize("written", ["se\ncret", "se\x00cret", "sécret", 5, ["secret"]])
def test_a_token_that_cannot_be_is_refused_without_showing_it(connect: Callable[..., Calls], tmp_path: Path, written: Any) -> None:
    for kind in (Client, AsyncClient, AdminClient, ControlClient):
        with pytest.raises(errors.ConfigError, match=r"^token (has characters|is of type)") as caught:
            kind("127.0.0.1:1", token=written)
        assert "cret" not in str(caught.value)


VERBS: dict[str, tuple[str, ...]] = {
    "bench": (),
    "top": ("--once",),
    "infer": ("--layer", "0", "--input", "{x}", "--output", "{x}"),
    "status": ("--admin-token-file", "{token}"),
    "scale": ("--hosts", "2", "--admin-token-file", "{token}"),
    "drain": ("host-0", "--admin-token-file", "{token}"),
    "swap": ("--layer", "0", "--checkpoint", "{x}", "--admin-token-file", "{token}"),
    "shutdown": ("--admin-token-file", "{token}"),
}


def argv(verb: str, target: str, folder: Path, **changed: str) -> list[str]:
    from safetensors.torch import save_file

    save_file({"hidden_states": X}, folder / "x")
    (folder / "a-token").write_text("secret")
    said = {"x": str(folder / "x"), "token": str(folder / "a-token"), **changed}
    return [verb, target, *(word.format(**said) for word in VERBS[verb])]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_says_what_is_wrong_with_its_target(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for target in ("127.0.0.1", "http://127.0.0.1:50051", "127.0.0.1:x"):
        assert main(argv(verb, target, tmp_path)) == 2
        assert capsys.readouterr().err.startswith(f"error: target is '{target}': ")


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(("content", "fault"), [(b"", "is empty"), (b" \r\n", "is empty"), (b"a\nb", "has char"), (b"\xff", "has char")])
def test_a_file_without_a_token_is_refused(
    verb: str, content: bytes, fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").write_bytes(content)
    command = argv(verb, "127.0.0.1:1", tmp_path, token=str(tmp_path / "empty"))
    command += [] if "--admin-token-file" in command else ["--token-file", str(tmp_path / "empty")]
    assert main(command) == 2
    assert capsys.readouterr().err.startswith(f"error: token file {tmp_path / 'empty'} {fault}")


def infer_to(output: Path, engine: FakeEngine, folder: Path) -> int:
    with served(engine) as (target, _, _):
        argv("infer", target, folder)
        return main(["infer", target, "--layer", "0", "--input", str(folder / "x"), "--output", str(output)])


def test_infer_leaves_a_pipe_a_pipe(engine: FakeEngine, tmp_path: Path) -> None:
    """Nor does it put a file where a device was, which root could."""
    from safetensors.torch import load

    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert infer_to(pipe, engine, tmp_path) == 0
        assert pipe.is_fifo()
        assert load(os.read(reader, 1 << 16))["hidden_states"].shape == X.shape
    finally:
        os.close(reader)


def test_infer_writes_where_a_link_leads(engine: FakeEngine, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    link, file = tmp_path / "link", tmp_path / "file"
    link.symlink_to(file)
    assert infer_to(link, engine, tmp_path) == 0
    assert link.is_symlink()
    assert load_file(file)["hidden_states"].shape == X.shape


@pytest.mark.parametrize("where", ["missing/y", ".", "circle/y"])
def test_infer_says_that_its_output_cannot_be_written(
    where: str, engine: FakeEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "circle").symlink_to("circle")
    assert infer_to(tmp_path / where, engine, tmp_path) == 2
    assert capsys.readouterr().err.startswith(f"error: --output {tmp_path / where} cannot be written: ")


@pytest.mark.parametrize("timeout", [math.inf, 1e300, 10**400, 1e9 + 1, 2**63, np.float32(30), 30, None])
async def test_a_timeout_may_be_long(connect: Callable[..., Calls], target: str, timeout: Any) -> None:
    calls = connect(target, timeout=timeout)
    for each in (None, timeout):
        await calls.forward(X, timeout=each)
        await calls.layers(timeout=each)
        assert len(await calls.forward_stream([WireRequest(X)], timeout=each)) == 1
    with AdminClient(target, "token") as admin, pytest.raises(errors.MoEServeError, match="does not offer this method"):
        admin.status(timeout=timeout)


@pytest.mark.parametrize("timeout", [0, 0.0, -1, -1e300, -math.inf, math.nan, "30", True])
async def test_what_is_no_time_to_wait_is_refused(connect: Callable[..., Calls], target: str, timeout: Any) -> None:
    sentence = r"^timeout is .*; allowed: seconds, more than 0, or None for no limit$"
    for kind in (Client, AsyncClient):
        with pytest.raises(errors.ConfigError, match=sentence):
            kind(target, timeout=timeout)
    calls = connect(target)
    for call in (calls.forward(X, timeout=timeout), calls.layers(timeout=timeout), calls.forward_stream([], timeout=timeout)):
        with pytest.raises(errors.InvalidRequest, match=sentence):
            await call


async def test_a_short_timeout_is_a_deadline(connect: Callable[..., Calls], target: str, engine: FakeEngine) -> None:
    engine.gate.clear()
    with pytest.raises(errors.DeadlineExceeded, match=f"no answer from {target} within 1e-300 s"):
        await connect(target).forward(X, timeout=1e-300)


@pytest.mark.parametrize("verb", ["bench", "top", "infer"])
def test_timeouts_of_verbs(verb: str, target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--requests", "1"] if verb == "bench" else []
    for timeout in ("nan", "0", "-1", "-inf"):
        assert main([*argv(verb, target, tmp_path), "--timeout", timeout]) == 2
        assert "error: --timeout is" in capsys.readouterr().err
    for timeout in ("inf", "1e300"):
        assert main([*argv(verb, target, tmp_path), *more, "--timeout", timeout]) == 0


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--controller", "localhost"), "controller is 'localhost': it has no port"),
        (("--controller", "http://127.0.0.1:50050"), "controller is 'http://127.0.0.1:50050': http:// does not belong there"),
        (("--controller", "127.0.0.1:1", "--host", "127.0.0.1:50051"), "server: host: must be a name or an address, without a port"),
        (("--controller", "127.0.0.1:1", "--host", "moe..example"), "server: host: must be a name or an address, without a port"),
    ],
)
def test_a_frontend_says_what_is_wrong(flags: tuple[str, ...], sentence: str, token_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["frontend", "--frontend-token-file", str(token_file), "--port", "0", "--metrics-port", "0", *flags]) == 2
    assert f"error: {sentence}" in capsys.readouterr().err


async def test_what_does_not_speak_grpc_is_said(connect: Callable[..., Calls]) -> None:
    """As the metrics port, whose address is told beside the other one."""
    from prometheus_client import CollectorRegistry

    from moeserve.observe.page import StatusPage

    page = StatusPage("127.0.0.1", 0, CollectorRegistry(), lambda: pytest.fail("nobody asks"))
    try:
        sentence = f"127.0.0.1:{page.port} is unavailable: the server there does not speak gRPC (is it a metrics port?)"
        with pytest.raises(errors.ServiceUnreachable, match=re.escape(sentence)):
            await connect(f"127.0.0.1:{page.port}").layers()
    finally:
        page.stop()


def test_which_targets_are_here() -> None:
    """From there nothing goes through a proxy."""
    here = ["127.0.0.1", "127.5.5.5", "localhost", "LOCALHOST", "moe.localhost", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0", "[::]"]
    for host in (*here, "dns:///localhost", "ipv6:[::1]"):
        assert parse_target(f"{host}:50051").is_here, host
    elsewhere = ["198.51.100.1", "moe.example", "localhost.example", "[2001:db8::1]"]
    for host in (*elsewhere, "dns:///moe.example", "ipv4:127.0.0.1:1,198.51.100.1"):
        assert not parse_target(f"{host}:50051").is_here, host
    assert parse_target("unix:/run/moe.sock").is_here and not parse_target("xds:///moe").is_here
