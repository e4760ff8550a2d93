"""Certificates and tokens that are replaced while the server runs."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc
import pytest

from moeserve.config import ServerConfig
from moeserve.errors import ConfigError
from moeserve.server.grpc_server import GrpcServer
from moeserve.v1 import moe_service_pb2_grpc as pb_grpc
from tests.support.certificates import Authority
from tests.support.engine import echo_engine
from tests.support.messages import request
from tests.support.servers import Running, run
from tests.support.waiting import until_async

OK, UNAUTHENTICATED, UNAVAILABLE = grpc.StatusCode.OK, grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNAVAILABLE

#: puts content into the file of a name in a folder
Put = Callable[[Path, str, bytes], None]


def in_place(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)


def by_renaming(folder: Path, name: str, content: bytes) -> None:
    (folder / f"{name}.new").write_bytes(content)
    (folder / f"{name}.new").rename(folder / name)


def as_kubernetes_does(folder: Path, name: str, content: bytes) -> None:
    """The file is a link through `..data`, a link itself, which is replaced by one to a new folder."""
    data, old = folder / "..data", os.path.realpath(folder / "..data")
    new = folder / f"..{len(list(folder.iterdir()))}"
    new.mkdir()
    if data.is_symlink():
        for file in Path(old).iterdir():
            shutil.copy2(file, new)
    (new / name).write_bytes(content)
    (folder / "..new").symlink_to(new.name)
    (folder / "..new").rename(data)
    if not (folder / name).is_symlink():
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(f"..data/{name}")


@pytest.fixture(params=[in_place, by_renaming, as_kubernetes_does])
def put(request: pytest.FixtureRequest) -> Put:
    return request.param


async def code_of(call: Awaitable[object]) -> grpc.StatusCode:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return OK


async def is_ok(call: Awaitable[grpc.StatusCode]) -> bool:
    return await call is OK


def token(running: Running, given: str) -> Callable[[], Awaitable[grpc.StatusCode]]:
    return lambda: code_of(running.stub.Forward(request(), metadata=[("authorization", f"Bearer {given}")]))


async def test_a_token_that_is_replaced_is_the_one_that_counts(tmp_path: Path, put: Put, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path, "token", b"first\n")
    running = await run(auth_token_file=tmp_path / "token")
    assert await token(running, "first")() is OK
    put(tmp_path, "token", b"other\n")
    await until_async(lambda: is_ok(token(running, "other")()))
    assert await token(running, "first")() is UNAUTHENTICATED
    assert [record.getMessage() for record in caplog.records if "in force" in record.getMessage()] == []
    await running.channel.close()
    await running.server.stop()


async def test_a_token_file_that_cannot_be_used_leaves_the_old_one_in_force(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "token"
    path.write_text("first")
    running = await run(auth_token_file=path)
    for broken in (b"two\nlines", None):
        caplog.clear()
        path.unlink() if broken is None else path.write_bytes(broken)
        async with asyncio.timeout(20):
            while not said(caplog):
                assert await token(running, "first")() is OK
        assert said(caplog)[0].startswith(f"the files read before stay in force: server.auth_token_file {path} ")
        for _ in range(20):
            assert await token(running, "first")() is OK
        assert len(said(caplog)) == 1
    path.write_text("other")
    await until_async(lambda: is_ok(token(running, "other")()))
    await running.channel.close()
    await running.server.stop()


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "in force" in record.getMessage()]


async def connected(running: Running, root: bytes, pair: tuple[Path, Path] | None = None) -> grpc.StatusCode:
    """The answer to a call over a connection that is new."""
    own = () if pair is None else (pair[1].read_bytes(), pair[0].read_bytes())
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.secure_channel(running.target, grpc.ssl_channel_credentials(root, *own), options=options) as channel:
        return await code_of(pb_grpc.MoEServiceStub(channel).Forward(request(), timeout=10))


@pytest.mark.parametrize("put", [as_kubernetes_does])
async def test_certificates_that_are_replaced_are_shown_to_who_connects_then(
    tmp_path: Path, put: Put, caplog: pytest.LogCaptureFixture
) -> None:
    served, *made = (tmp_path / name for name in ("served", "old", "new"))
    for folder in (served, *made):
        folder.mkdir()
    old, new = (Authority(folder, folder.name) for folder in made)

    def serve(authority: Authority) -> None:
        for name, path in zip(("tls.crt", "tls.key"), authority.sign("server"), strict=True):
            put(served, name, path.read_bytes())
        put(served, "ca.crt", authority.certificate.read_bytes())

    serve(old)
    running = await run(tls_cert=served / "tls.crt", tls_key=served / "tls.key", client_ca=served / "ca.crt")
    await running.channel.close()
    roots = {authority: authority.certificate.read_bytes() for authority in (old, new)}
    pairs = {authority: authority.sign("client") for authority in (old, new)}
    own = grpc.ssl_channel_credentials(roots[old], pairs[old][1].read_bytes(), pairs[old][0].read_bytes())
    async with grpc.aio.secure_channel(running.target, own) as connected_before:
        stub = pb_grpc.MoEServiceStub(connected_before)
        assert await code_of(stub.Forward(request(), timeout=10)) is OK
        serve(new)
        await until_async(lambda: is_ok(connected(running, roots[new], pairs[new])))
        assert await connected(running, roots[old], pairs[old]) is UNAVAILABLE
        assert await connected(running, roots[new], pairs[old]) is UNAVAILABLE
        assert await code_of(stub.Forward(request(), timeout=10)) is OK

    # A certificate without its key is half of a change.
    put(served, "tls.crt", old.sign("server")[0].read_bytes())
    async with asyncio.timeout(20):
        while not any("are not a pair" in line for line in said(caplog)):
            assert await connected(running, roots[new], pairs[new]) is OK
    serve(old)
    await until_async(lambda: is_ok(connected(running, roots[old], pairs[old])))
    await running.server.stop()


@pytest.mark.parametrize("key", ["auth_token_file", "admin_token_file", "tls_key"])
async def test_a_secret_that_everybody_could_have_written_is_refused(tmp_path: Path, key: str) -> None:
    files = secrets(tmp_path)
    files[key].chmod(0o666)
    with pytest.raises(ConfigError, match=rf"server\.{key} {files[key]} cannot be read: Every user of this machine can write it"):
        GrpcServer(ServerConfig(**files), lambda method, code, seconds: None, engine=echo_engine())


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o600])
async def test_a_secret_that_everybody_can_read_is_warned_about(tmp_path: Path, mode: int, caplog: pytest.LogCaptureFixture) -> None:
    files = secrets(tmp_path)
    for path in files.values():
        path.chmod(mode)
    with caplog.at_level(logging.WARNING, "moeserve"):
        server = GrpcServer(ServerConfig(**files), lambda method, code, seconds: None, engine=echo_engine())
    await server.stop()
    warned = {str(path) for path in files.values() if mode & 0o004} - {str(files["tls_cert"])}
    said = [record.getMessage().partition(" holds a secret, and every user") for record in caplog.records]
    assert {path for path, sign, _ in said if sign} == warned


def secrets(folder: Path) -> dict[str, Path]:
    cert, key = Authority(folder, "ours").sign("server")
    (folder / "callers").write_text("of callers")
    (folder / "admin").write_text("of the administrator")
    files = {"tls_cert": cert, "tls_key": key, "auth_token_file": folder / "callers", "admin_token_file": folder / "admin"}
    for path in files.values():
        path.chmod(0o600)
    return files
