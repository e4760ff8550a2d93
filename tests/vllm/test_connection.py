"""How a process of vLLM calls the service: needs no vLLM."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from moeserve import Client, ConfigError, EmbeddedClient, MoEServeError
from moeserve.engines.vllm.connection import connect
from moeserve.engines.vllm.settings import Settings, settings_of
from tests.support.followers import TOKEN
from tests.support.harness import ServiceHarness
from tests.support.two_layers import CONFIG

LOGGER = "vllm.moeserve"


def said(caplog: pytest.LogCaptureFixture) -> str:
    """The one line about the client."""
    (line,) = [record.getMessage() for record in caplog.records if record.name == LOGGER]
    return line


@pytest.fixture
def connected(caplog: pytest.LogCaptureFixture) -> Iterator[Any]:
    caplog.set_level(logging.INFO, LOGGER)
    with ExitStack() as stack:
        yield lambda target, **more: stack.enter_context(connect(Settings(target=target, **more)))


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceHarness]:
    with ServiceHarness(CONFIG, "shm", tmp_path_factory.mktemp("service")) as running:
        yield running


def test_a_service_of_this_user_on_this_machine_gets_a_frontend_here(
    service: ServiceHarness, connected: Any, caplog: pytest.LogCaptureFixture
) -> None:
    client = connected(service.target)
    assert isinstance(client, EmbeddedClient)
    assert said(caplog) == f"experts of {service.target}: called by a frontend in this process"
    names = [member.name for member in service.frontends.members()]
    assert any(name.endswith(f"-{os.getpid()} (vLLM)") for name in names), names
    rows = torch.randn(3, client.layers()[0].hidden_size)
    with Client(service.target) as far:
        assert torch.equal(client.forward(rows).hidden_states, far.forward(rows).hidden_states)


def test_grpc_where_it_is_wished(service: ServiceHarness, connected: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert isinstance(connected(service.target, embedded=False), Client)
    assert said(caplog) == f"experts of {service.target}: called over gRPC (moeserve.embedded is false)"


def test_grpc_where_no_controller_of_this_user_is(connected: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert isinstance(connected("127.0.0.1:1"), Client)
    assert said(caplog) == "experts of 127.0.0.1:1: called over gRPC (no controller of the same user is there on this machine)"


def test_an_embedded_frontend_that_cannot_be_is_an_error(connected: Any) -> None:
    with pytest.raises(MoEServeError, match="is unavailable"):
        connected("127.0.0.1:1", embedded=True)


def test_another_controller_is_followed_with_its_token(service: ServiceHarness, connected: Any, tmp_path: Path) -> None:
    """As on another machine: nobody invites at its port."""
    service.call(service.open_control())
    (tmp_path / "token").touch(0o600)
    (tmp_path / "token").write_text(TOKEN)
    client = connected(service.control_target, embedded=True, token_file=str(tmp_path / "token"))
    assert isinstance(client, EmbeddedClient) and len(client.layers()) == len(CONFIG["layers"])


def test_other_values_are_refused() -> None:
    assert settings_of({"moeserve": {"target": "somewhere:1", "embedded": True}}) == Settings(target="somewhere:1", embedded=True)
    with pytest.raises(ConfigError, match='is 1; allowed: true, false, "auto"'):
        settings_of({"moeserve": {"target": "somewhere:1", "embedded": 1}})


def test_any_file_of_tls_turns_it_on(connected: Any) -> None:
    with pytest.raises(ConfigError, match="TLS cert and key must be given together"):
        connected("127.0.0.1:1", embedded=False, tls_key="key.pem")
