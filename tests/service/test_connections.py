"""Where a service says that it is, and connections to it that age."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from moeserve import Client
from moeserve.cli.app import main
from moeserve.client import AdminClient
from moeserve.server.control import Control
from moeserve.server.grpc_server import GrpcServer
from moeserve.server.security import frontend_tokens
from tests.support.followers import TOKEN, ThreadedFrontend
from tests.support.harness import ServiceHarness
from tests.support.seen import epochs
from tests.support.two_layers import CONFIG, answers


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


def test_what_frontends_say_of_themselves_can_be_called(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By every client and verb, for every way to say where to listen."""
    (tmp_path / "admin").write_text("change\n")
    with ServiceHarness({**CONFIG, "server": {"port": 0, "admin_token_file": tmp_path / "admin"}}, "shm", tmp_path) as service:
        service.call(service.open_control())
        for host in ("0.0.0.0", "localhost", "127.0.0.2", *(("::1", "[::1]", "::") if has_ipv6() else ())):
            server = {"host": host, "insecure": True}
            with ThreadedFrontend(service.control_target, server=server) as frontend, AdminClient(service.target, "change") as admin:
                (listed,) = [one for one in admin.status().frontends if one.name != "serve"]
                assert listed.target == frontend.target
                answers(listed.target)
                assert main(["top", listed.target, "--once"]) == 0
                assert main(["top", listed.metrics_target, "--once"]) == 3
                assert f"{listed.metrics_target} is unavailable: " in capsys.readouterr().err


def test_frontends_follow_over_connections_that_age(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where a service serves and is followed on one port: it ages connections, but cuts no stream."""
    with ServiceHarness({**CONFIG, "server": {"port": 0, "max_connection_age_s": 0.05}}, "shm", tmp_path) as service:

        async def serve() -> tuple[GrpcServer, int]:
            control = Control(service.frontends, frontend_tokens(service.config.controller, TOKEN))
            both = GrpcServer(service.config.server, service.metrics.observe_call, engine=service.frontend, control=control)
            return both, await both.start()

        both, port = service.call(serve())
        with ThreadedFrontend(f"127.0.0.1:{port}") as follower, Client(f"127.0.0.1:{port}") as client:
            end = time.monotonic() + 1.0
            while time.monotonic() < end:
                client.layers()
            assert service.call(service.controller.scale(4)).epoch == 2
            assert epochs(service) == [2, 2]
            answers(follower.target)
        service.call(both.stop())
    assert "the controller cannot be reached" not in caplog.text
