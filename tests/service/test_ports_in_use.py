"""Somebody listens at a port already: that is said before anything is started that takes time."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from typing import Literal, get_args

import pytest

from moeserve import ConfigError
from moeserve.cluster.threads import ThreadCluster
from moeserve.config import ServedModel, ServerConfig, load_config
from moeserve.programs.frontend import FrontendProgram
from moeserve.programs.grpc_orders import GrpcOrders
from moeserve.programs.serve import Service
from tests.support.two_layers import CONFIG

Key = Literal["port", "metrics_port", "health_port"]


class Slow(ThreadCluster):
    """Takes for ever to start, as far as this test is concerned."""

    async def start(self) -> None:
        await asyncio.Event().wait()


@pytest.fixture(params=get_args(Key))
def taken(request: pytest.FixtureRequest) -> Iterator[tuple[dict[Key, int], str]]:
    """[server], one of whose ports is taken, and what is said of it."""
    key: Key = request.param
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        ports: dict[Key, int] = {"port": 0, "metrics_port": 0, "health_port": 0}
        sentence = rf"^server\.host, server\.{key}: cannot listen on 127\.0\.0\.1:{port}: Address already in use$"
        yield {**ports, key: port}, sentence


async def test_serve_says_so_before_its_cluster_starts(taken: tuple[dict[Key, int], str]) -> None:
    ports, sentence = taken
    config = load_config({**CONFIG, "server": ports})
    told: list[str] = []
    cluster = Slow(config.only(ServedModel), config.placement, config.ray)
    with pytest.raises(ConfigError, match=sentence):
        await asyncio.wait_for(Service(config, told.append, cluster).start(), 30)
    assert told == []


async def test_a_frontend_says_so_before_it_has_reached_a_controller(taken: tuple[dict[Key, int], str]) -> None:
    ports, sentence = taken
    with socket.create_server(("127.0.0.1", 0)) as silent:
        orders = GrpcOrders(f"127.0.0.1:{silent.getsockname()[1]}", "token")
        with pytest.raises(ConfigError, match=sentence):
            await asyncio.wait_for(FrontendProgram(ServerConfig.model_validate(ports), orders).start(), 30)
