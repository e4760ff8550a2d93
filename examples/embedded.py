"""A frontend inside this program against calls over gRPC: python examples/embedded.py [HOST:PORT].

Without the address of a service on this machine, the example first starts one, whose hosts are threads of this process.
"""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import torch

import moeserve

TINY = Path(__file__).parent / "tiny-moe"
CALLS = 200


def milliseconds(client: moeserve.Client | moeserve.EmbeddedClient, token: torch.Tensor) -> float:
    """Median of the calls with one token."""
    found = []
    for _ in range(CALLS):
        began = time.perf_counter()
        client.forward(token)
        found.append(time.perf_counter() - began)
    return 1000 * median(found)


def main(target: str | None) -> None:
    """Print how long a call takes both ways, and whether the answers are equal."""
    config = {"model": {"checkpoint": TINY}, "placement": {"num_hosts": 2}, "server": {"port": 0, "metrics_port": 0}}
    with ExitStack() as running:
        target = target or running.enter_context(moeserve.serve(config, cluster="threads")).target
        far, near = running.enter_context(moeserve.Client(target)), running.enter_context(moeserve.EmbeddedClient(target))
        tokens = torch.randn(16, near.layers()[0].hidden_size)
        is_equal = torch.equal(near.forward(tokens).hidden_states, far.forward(tokens).hidden_states)
        print(f"equal answers: {is_equal}")
        for name, client in (("gRPC", far), ("embedded", near)):
            print(f"{name}: {milliseconds(client, tokens[:1]):.2f} ms for one token")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
