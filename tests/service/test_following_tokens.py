"""A frontend elsewhere whose token is replaced while it follows."""

from __future__ import annotations

from pathlib import Path

import pytest

from moeserve import Unauthenticated
from moeserve.cli.token import rotating_token
from tests.support.followers import ThreadedFrontend
from tests.support.harness import ServiceHarness
from tests.support.seen import epochs
from tests.support.two_layers import CONFIG
from tests.support.waiting import until_async


def test_it_comes_back_with_the_token_that_is_valid_by_then(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("first\n")
    path.chmod(0o600)
    with ServiceHarness({**CONFIG, "controller": {"frontend_token_file": path}}, "shm", tmp_path) as service:
        service.call(service.open_control())
        with ThreadedFrontend(service.control_target, token=rotating_token(path)):
            service.call(service.close_control())
            service.call(until_async(lambda: epochs(service) == [1]))
            path.write_text("other\n")
            service.call(service.reopen_control())
            service.call(until_async(lambda: epochs(service) == [1, 1]))
        with pytest.raises(Unauthenticated), ThreadedFrontend(service.control_target, token="first"):
            pass
