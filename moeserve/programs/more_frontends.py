"""More frontends of `serve` on its port, in processes of their own, with what they follow."""

from __future__ import annotations

from collections.abc import Mapping

from moeserve.addresses import join
from moeserve.config import ServerConfig, ServiceConfig
from moeserve.control.frontends import Frontends
from moeserve.programs.controller import ControllerProgram
from moeserve.programs.frontend_processes import FrontendProcesses
from moeserve.server.control import Control
from moeserve.server.grpc_server import GrpcServer
from moeserve.server.security import frontend_tokens

_LOOPBACK = "127.0.0.1"
#: the placement of the largest models takes some hundred KB
_MAX_MESSAGE_BYTES = 64 * 2**20


class MoreFrontends:
    """server.processes - 1 frontends that listen at `port`, too.

    They follow the controller of this process on a port of loopback, which asks for `token`: the one that this process gives to programs of
    its user, because these may reach any of the processes. What administrators and frontends elsewhere ask of them is passed on to it.
    """

    def __init__(self, config: ServiceConfig, program: ControllerProgram, port: int, token: str) -> None:
        self._config, self._program, self._port, self._token = config, program, port, token
        self._control: GrpcServer | None = None
        self._processes: FrontendProcesses | None = None

    async def start(self) -> None:
        """Returns when all are ready. Raises the error of one that cannot start."""
        config, program, token = self._config, self._program, self._token
        address = ServerConfig(
            host=_LOOPBACK, port=0, admin_token_file=config.server.admin_token_file, max_message_bytes=_MAX_MESSAGE_BYTES
        )
        control = Control(program.frontends, frontend_tokens(config.controller, token))
        self._control = GrpcServer(address, _ignore, admin=program.controller, control=control)
        server = config.server.model_copy(update={"port": self._port, "metrics_port": 0, "health_port": None})
        file = config.controller.frontend_token_file
        told = {
            "server": server.model_dump(mode="json"),
            "controller": join(_LOOPBACK, await self._control.start()),
            "token": token,
            "token_file": None if file is None else str(file),
            # Threads of this process are reached over TCP.
            "node": "" if config.cluster.kind == "threads" else program.cluster.here,
        }
        self._processes = FrontendProcesses(_names(config.server.processes), told, config.server.drain_timeout_s)
        await self._processes.start()

    async def stop(self) -> None:
        """Drain and end them."""
        if self._processes is not None:
            await self._processes.stop()
        if self._control is not None:
            await self._control.stop()

    def hurry(self) -> None:
        """While they drain: end them now."""
        if self._processes is not None:
            self._processes.hurry()


def metrics_targets(frontends: Frontends, processes: int) -> Mapping[str, str]:
    """Of those that share the port of this process, by name; frontends elsewhere are asked by whoever watches them."""
    names = _names(processes)
    return {one.name: one.metrics_target for one in frontends.members() if one.name in names and one.metrics_target}


def _names(processes: int) -> list[str]:
    return [f"serve-{number}" for number in range(1, processes)]


def _ignore(_method: str, _code: str, _seconds: float) -> None:
    """Its calls are counted where they arrive."""
