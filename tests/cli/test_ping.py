"""`moeserve ping` as a script of an operator reads it: one line, and a code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from moeserve import Client, MoEServeError
from moeserve.cli.app import main
from moeserve.client import TLS, AdminClient
from moeserve.files.version import running_version
from tests.support.certificates import Authority
from tests.support.engine import X, echo_engine
from tests.support.followers import ThreadedFrontend
from tests.support.harness import ServiceHarness
from tests.support.servers import served
from tests.support.waiting import until

MOESERVE = f"moeserve {running_version()}"
Ping = Callable[..., tuple[int, str, str]]


@pytest.fixture
def ping(capsys: pytest.CaptureFixture[str]) -> Ping:
    def ping(target: str, *flags: object) -> tuple[int, str, str]:
        code = main(["ping", target, *map(str, flags)])
        told = capsys.readouterr()
        return code, told.out, told.err

    return ping


@pytest.fixture
def service(tmp_path: Path) -> Iterator[ServiceHarness]:
    layers = [{"name": name, "hidden_size": 16, "intermediate_size": 8, "num_experts": 4} for name in ("first", "second")]
    with ServiceHarness({"layers": layers, "placement": {"num_hosts": 2}}, "local", tmp_path) as service:
        yield service


def test_a_service_a_frontend_and_a_controller(service: ServiceHarness, ping: Ping) -> None:
    service.call(service.open_control())
    assert ping(service.target) == (0, f"{service.target}: service, {MOESERVE}, epoch 1, ready\n", "")
    with ThreadedFrontend(service.control_target) as frontend:
        assert ping(frontend.target) == (0, f"{frontend.target}: frontend, {MOESERVE}, epoch 1, ready\n", "")
    assert ping(service.control_target) == (0, f"{service.control_target}: controller, {MOESERVE}, epoch 1, ready\n", "")

    service.hosts[1].stop()
    until(lambda: ping(service.target)[0] == 3)
    missing = "not ready: experts without a live copy in first and 1 more"
    assert ping(service.target) == (3, f"{service.target}: service, {MOESERVE}, epoch 1, {missing}\n", "")


def test_nobody_and_a_service_that_drains(ping: Ping) -> None:
    code, out, err = ping("127.0.0.1:1")
    assert (code, out) == (3, "") and err.startswith("error: 127.0.0.1:1 is unavailable") and err.count("\n") == 1
    engine = echo_engine()
    engine.gate.clear()
    with served(engine) as (target, server, loop), ThreadPoolExecutor() as pool, Client(target) as client:
        waiting = pool.submit(client.forward, X)
        until(lambda: engine.requests)
        draining = loop.submit(server.drain(60.0))
        until(lambda: "not ready: it is draining" in ping(target)[1])
        assert ping(target)[0] == 3
        loop.soon(engine.gate.set)
        assert waiting.result(timeout=60).processed.sum() > 0
        draining.result(timeout=60)


def test_tokens_and_tls(tmp_path: Path, ping: Ping) -> None:
    """A caller's token is enough, the administrator's is too; where callers need none, none is asked for."""
    authority = Authority(tmp_path, "ours")
    cert, key = authority.sign("server")
    for name in ("caller", "admin", "wrong"):
        (tmp_path / name).write_text(f"of the {name}")
    for path in (key, *(tmp_path / name for name in ("caller", "admin", "wrong"))):
        path.chmod(0o600)
    tokens = {"auth_token_file": tmp_path / "caller", "admin_token_file": tmp_path / "admin"}
    with served(echo_engine(), tls_cert=cert, tls_key=key, **tokens) as (target, server, loop):
        for layer in range(2):
            loop.soon(server.set_serving, layer, True)
        tls = ("--tls-ca", authority.certificate)
        for name in ("caller", "admin"):
            assert ping(target, *tls, "--token-file", tmp_path / name)[:2] == (0, f"{target}: frontend, {MOESERVE}, epoch 3, ready\n")
        for flags in ((), ("--token-file", tmp_path / "wrong")):
            code, out, err = ping(target, *tls, *flags)
            assert (code, out) == (1, "") and "the bearer token is missing or wrong" in err
        assert ping(target, "--token-file", tmp_path / "caller")[0] == 3
        with AdminClient(target, "of the caller", tls=TLS(ca=authority.certificate)) as client:
            assert client.ping().is_ready
            with pytest.raises(MoEServeError, match="does not offer this method"):
                client.status()
