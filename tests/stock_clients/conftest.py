from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "node"

#: script and arguments -> the lines it prints
Node = Callable[..., Awaitable[list[str]]]


@pytest.fixture(scope="session")
def node(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Node:
    """Runs a script in Node with the packages that the example names. They are kept for the next run of the tests."""
    program, npm = shutil.which("node"), shutil.which("npm")
    if program is None or npm is None:
        pytest.skip("node and npm are not installed: they are needed to call the service as a stock client does")
    packages = request.config.cache.mkdir("node")
    shutil.copy(EXAMPLE / "package.json", packages)
    quiet = ["--no-package-lock", "--no-audit", "--no-fund", "--no-update-notifier", "--ignore-scripts", "--fetch-retries=1"]
    command = [npm, "install", *quiet, "--cache", str(tmp_path_factory.mktemp("npm"))]
    try:
        subprocess.run(command, cwd=packages, capture_output=True, text=True, timeout=120, check=True)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"the packages of a stock client cannot be installed: {str(error.stderr or error).strip()[-200:]}")

    async def run(*command: str) -> list[str]:
        environment = os.environ | {"NODE_PATH": str(packages / "node_modules")}
        process = await asyncio.create_subprocess_exec(program, *command, env=environment, stdout=-1, stderr=-1)
        try:
            out, said = await asyncio.wait_for(process.communicate(), 60)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        assert process.returncode == 0, said.decode()
        return out.decode().splitlines()

    return run
