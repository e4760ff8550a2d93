"""A service whose page shows something."""

from __future__ import annotations

from dataclasses import dataclass

from moeserve.observe.page import StatusPage
from tests.support.harness import ServiceHarness

NUM_EXPERTS, TOKENS = 8, 1234

LAYER = {"hidden_size": 16, "intermediate_size": 8, "num_experts": NUM_EXPERTS}


@dataclass
class Loaded:
    """A service after a load that is known, and its page."""

    service: ServiceHarness
    page: StatusPage

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.page.port}"
