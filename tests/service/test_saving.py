"""A controller whose state cannot be saved."""

from __future__ import annotations

from pathlib import Path

import pytest

from moeserve import ExpertUnavailable
from moeserve.control.saved import Saved
from tests.support.harness import ServiceHarness
from tests.support.two_layers import CONFIG


def test_a_change_that_cannot_be_saved_is_not_made_by_a_later_controller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray may get what was not saved in time a moment later."""
    asked: list[int | str] = []

    def save(value: bytes) -> None:
        asked.append(Saved.from_bytes(value).state.num_hosts)
        raise ExpertUnavailable("Ray does not answer")

    with ServiceHarness(CONFIG, "local", tmp_path) as service:
        service.cluster.nodes.cpus = 2
        with monkeypatch.context() as away:
            away.setattr(service.cluster.store, "save", save)
            with pytest.raises(ExpertUnavailable, match="Ray does not answer"):
                service.call(service.controller.scale("all"))
        assert asked[0] == "all" and asked[-1] == service.controller.state.num_hosts == 2
