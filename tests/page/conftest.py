from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from moeserve import Client, InvalidRequest
from moeserve.observe.page import StatusPage
from tests.page.loaded import LAYER, TOKENS, Loaded
from tests.support.harness import ServiceHarness
from tests.support.waiting import until


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    """Layer 0: two requests of 1234 tokens in all and drops; layer 1: nothing; and one call that failed. Host 2 is down."""
    config = {
        "layers": [{**LAYER, "name": "first", "gating": {"top_k": 2, "capacity_factor": 1.0}}, {**LAYER, "name": "<b>second</b>"}],
        "placement": {"num_hosts": 3, "tensor_parallel": 2, "copies": 1},
        "balancing": {"interval_s": 0.1},
    }
    with ServiceHarness(config, "local", tmp_path_factory.mktemp("s")) as service:
        until(lambda: service.is_counting)
        with Client(service.target) as client:
            for tokens in (TOKENS - 34, 34):
                client.forward(torch.randn(tokens, 16), layer=0)
            with pytest.raises(InvalidRequest):
                client.forward(torch.randn(1, 3), layer=0)
            service.hosts[2].stop()
            until(lambda: not (stats := client.stats()).hosts[2].up and stats.layers[0].host_balancedness is not None)
        page = StatusPage("127.0.0.1", 0, service.metrics.registry, service.frontend.stats)
        yield Loaded(service, page)
        page.stop()
        service.hosts[2].start()
