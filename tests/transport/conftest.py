from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from moeserve.transport import FrontendKeys, HostKeys, KeyPair, Limits, listen

from .rig import Rig, RigFactory


@pytest.fixture(params=["local", "unix", "tcp", "curve"])
def make_rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RigFactory]:
    """A function of max_message_bytes and max_pool_bytes that makes a Rig, over each kind of endpoint in turn."""
    rigs: list[Rig] = []
    frontend, host = KeyPair.generate(), KeyPair.generate()
    endpoint = {"local": "local:host", "unix": f"unix:{tmp_path}/host.sock"}.get(request.param, "tcp://127.0.0.1:0")

    def make(max_message_bytes: int = 2**20, max_pool_bytes: int = 2**22) -> Rig:
        limits = Limits(max_message_bytes, max_pool_bytes)
        with_keys = request.param == "curve"
        listener = listen(endpoint, limits=limits, keys=HostKeys(host, frozenset({frontend.public})) if with_keys else None)
        rigs.append(Rig(listener, limits, FrontendKeys(frontend, host.public) if with_keys else None))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.listener.close()


@pytest.fixture
def rig(make_rig: RigFactory) -> Rig:
    return make_rig()
