"""Who may reach the service and call it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2_grpc

from moeserve.config import ServerConfig
from moeserve.errors import ConfigError
from moeserve.server.grpc_server import GrpcServer
from moeserve.server.security import check_exposure, read_tokens
from moeserve.v1 import moe_service_pb2 as pb
from moeserve.v1 import moe_service_pb2_grpc as pb_grpc
from tests.support.certificates import Authority
from tests.support.engine import echo_engine
from tests.support.messages import request
from tests.support.servers import Running, run

CERT, KEY, CA, TOKEN = (Path(name) for name in ("cert.pem", "key.pem", "ca.pem", "token"))


@asynccontextmanager
async def serving(**config: object) -> AsyncIterator[Running]:
    started = await run(**config)
    try:
        yield started
    finally:
        await started.stop()


@pytest.mark.parametrize(
    "config",
    [
        {"host": "127.0.0.1"},
        {"host": "127.8.8.8"},
        {"host": "::1"},
        {"host": "localhost"},
        {"host": "0.0.0.0", "insecure": True},
        {"host": "0.0.0.0", "tls_cert": CERT, "tls_key": KEY, "auth_token_file": TOKEN},
        {"host": "::", "tls_cert": CERT, "tls_key": KEY, "client_ca": CA},
    ],
)
def test_loopback_or_protected_or_spelled_out_may_serve(config: dict[str, object]) -> None:
    check_exposure(ServerConfig(**config))


def test_one_token_for_callers_and_the_administrator_is_refused(tmp_path: Path) -> None:
    (tmp_path / "one").write_text("same")
    (tmp_path / "other").write_text("same\n")
    with pytest.raises(ConfigError, match=r"server\.admin_token_file and server\.auth_token_file hold the same token"):
        read_tokens(ServerConfig(auth_token_file=tmp_path / "one", admin_token_file=tmp_path / "other"))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "moe.example.org", ""])
@pytest.mark.parametrize("config", [{}, {"auth_token_file": TOKEN}, {"tls_cert": CERT, "tls_key": KEY}])
async def test_anything_else_is_refused_before_it_listens(host: str, config: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"server\.host .* can be reached from other machines: set server\.tls_cert"):
        GrpcServer(ServerConfig(host=host, **config), lambda method, code, seconds: None, engine=echo_engine())


async def code_of(call: grpc.aio.UnaryUnaryCall) -> grpc.StatusCode:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


@pytest.mark.parametrize("given", [None, "", "secret", "Bearer", "Bearer wrong", "Bearer secre", "Basic secret", "Bearer secret secret"])
async def test_without_the_token_nothing_is_answered(tmp_path: Path, given: str | None) -> None:
    (tmp_path / "token").write_text("secret\n")
    metadata = None if given is None else [("authorization", given)]
    async with serving(auth_token_file=tmp_path / "token") as running:
        stub = running.stub
        assert await code_of(stub.Forward(request(), metadata=metadata)) is grpc.StatusCode.UNAUTHENTICATED
        assert await code_of(stub.ListLayers(pb.ListLayersRequest(), metadata=metadata)) is grpc.StatusCode.UNAUTHENTICATED
        stream = stub.ForwardStream(metadata=metadata)
        with pytest.raises(grpc.aio.AioRpcError, match="bearer token is missing or wrong"):
            await stream.read()
        listing = reflection_pb2_grpc.ServerReflectionStub(running.channel).ServerReflectionInfo(metadata=metadata)
        with pytest.raises(grpc.aio.AioRpcError, match="bearer token is missing or wrong"):
            await listing.read()
        assert [code for _, code in running.observed] == ["UNAUTHENTICATED"] * 4
        assert running.engine.requests == []


async def test_a_caller_without_the_token_is_refused_before_its_message_is_read(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret")
    async with serving(auth_token_file=tmp_path / "token") as running:
        call = running.channel.stream_unary("/moeserve.v1.MoEService/Forward")()
        assert await code_of(call) is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize("given", ["Bearer secret", "bearer secret", "Bearer  secret"])
async def test_with_the_token_everything_is(tmp_path: Path, given: str) -> None:
    (tmp_path / "token").write_text("  secret\n\n")
    async with serving(auth_token_file=tmp_path / "token") as running:
        assert await code_of(running.stub.Forward(request(), metadata=[("authorization", given)])) is grpc.StatusCode.OK


async def test_health_needs_no_token(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret")
    async with serving(auth_token_file=tmp_path / "token") as running:
        assert await code_of(health_pb2_grpc.HealthStub(running.channel).Check(health_pb2.HealthCheckRequest())) is grpc.StatusCode.OK


@pytest.mark.parametrize("content", [None, b"", b" \n", b"two\nlines", "schlüssel".encode()])
async def test_a_token_file_that_cannot_work_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "token"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"server\.auth_token_file {path} "):
        GrpcServer(ServerConfig(auth_token_file=path), lambda method, code, seconds: None, engine=echo_engine())


async def test_tls_and_mutual_tls(tmp_path: Path) -> None:
    ours, theirs = Authority(tmp_path, "ours"), Authority(tmp_path, "theirs")
    cert, key = ours.sign("server")
    root = ours.certificate.read_bytes()
    pairs = {name: tuple(path.read_bytes() for path in by.sign(name)) for name, by in (("client", ours), ("stranger", theirs))}

    async def answer(running: Running, root: bytes, pair: tuple[bytes, ...] | None = None) -> grpc.StatusCode:
        credentials = grpc.ssl_channel_credentials(root, *(pair[::-1] if pair else ()))
        async with grpc.aio.secure_channel(running.target, credentials) as channel:
            return await code_of(pb_grpc.MoEServiceStub(channel).Forward(request(), timeout=10))

    async with serving(tls_cert=cert, tls_key=key) as running:
        assert await answer(running, root) is grpc.StatusCode.OK
        assert await answer(running, theirs.certificate.read_bytes()) is grpc.StatusCode.UNAVAILABLE
        assert await code_of(running.stub.Forward(request(), timeout=10)) is grpc.StatusCode.UNAVAILABLE
    async with serving(tls_cert=cert, tls_key=key, client_ca=ours.certificate) as running:
        assert await answer(running, root, pairs["client"]) is grpc.StatusCode.OK
        assert await answer(running, root) is grpc.StatusCode.UNAVAILABLE
        assert await answer(running, root, pairs["stranger"]) is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("broken", ["tls_cert", "tls_key", "client_ca"])
@pytest.mark.parametrize("content", [None, b"not a certificate"])
async def test_a_tls_file_that_cannot_work_is_named(tmp_path: Path, broken: str, content: bytes | None) -> None:
    authority = Authority(tmp_path, "authority")
    cert, key = authority.sign("server")
    files = {"tls_cert": cert, "tls_key": key, "client_ca": authority.certificate, broken: tmp_path / "broken.pem"}
    if content is not None:
        files[broken].write_bytes(content)
    with pytest.raises(ConfigError, match=rf"server\.{broken} {files[broken]} "):
        GrpcServer(ServerConfig(**files), lambda method, code, seconds: None, engine=echo_engine())
