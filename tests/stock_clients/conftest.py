from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import AsyncIterator

import pytest

from tests.stock_clients.node import EXAMPLE, Node
from tests.support.servers import Running, run


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> Node:
    """Runs a script in Node with the packages that the example names."""
    program, npm = shutil.which("node"), shutil.which("npm")
    if program is None or npm is None:
        pytest.skip("node and npm are not installed: they are needed to call the service as a stock client does")
    packages = tmp_path_factory.mktemp("node")
    shutil.copy(EXAMPLE / "package.json", packages)
    quiet = [
        "--no-package-lock",
        "--no-audit",
        "--no-fund",
        "--no-update-notifier",
        "--ignore-scripts",
        "--fetch-retries=1",
        "--fetch-retry-mintimeout=1000",
    ]
    command = [npm, "install", *quiet, "--cache", str(packages / "cache")]
    try:
        subprocess.run(command, cwd=packages, capture_output=True, text=True, timeout=120, check=True)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"the packages of a stock client cannot be installed: {error.stderr or error}"[:300])

    async def run_node(*command: str) -> list[str]:
        environment = os.environ | {"NODE_PATH": str(packages / "node_modules"), "no_grpc_proxy": "127.0.0.1"}
        process = await asyncio.create_subprocess_exec(program, *command, env=environment, stdout=-1, stderr=-1)
        try:
            out, said = await asyncio.wait_for(process.communicate(), 60)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        assert process.returncode == 0, said.decode()
        return out.decode().splitlines()

    return run_node


@pytest.fixture
async def running() -> AsyncIterator[Running]:
    """A server that echoes, with room for messages above the stock limit."""
    started = await run(max_tokens_per_request=2**18)
    yield started
    await started.channel.close()
    await started.server.stop()
