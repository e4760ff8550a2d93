"""The loads of the hosts before and after balancing, as a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moeserve.errors import ConfigError
from moeserve.simulate.forecast import Forecast


def draw(forecast: Forecast, path: Path) -> None:
    """Writes a PNG: load of each host, the busiest first, and how long callers wait. Raises ConfigError when it cannot."""
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - nothing else needs it, and it may be missing
    except ImportError:
        raise ConfigError("--plot needs matplotlib, which is not installed: pip install 'moeserve[plot]'") from None
    figure = Figure(figsize=(10, 4), layout="constrained")
    hosts, waits = figure.subplots(1, 2)
    for label, even, loads in zip(
        ("one copy each, as dealt", "balanced"), (forecast.balancedness_before, forecast.balancedness), forecast.loads(), strict=True
    ):
        hosts.step(np.arange(1, len(loads) + 1), np.sort(loads)[::-1], where="mid", label=f"{label}: balancedness {even:.3f}")
    hosts.axhline(1, color="gray", linewidth=0.8)
    hosts.set(xlabel="hosts, the busiest first", ylabel="rows / mean over the hosts", ylim=(0, None), title="Load of the hosts")
    hosts.legend()
    waited = np.sort(forecast.calls.latencies_s) * 1e3
    waits.plot(waited, np.arange(1, len(waited) + 1) / len(waited))
    waits.axvline(forecast.calls.p99_ms, color="gray", linewidth=0.8, label=f"p99 {forecast.calls.p99_ms:.1f} ms")
    waits.set(xlabel="ms", ylabel="share of the calls", ylim=(0, 1), title=f"Latency at {forecast.calls.tokens_per_s:,.0f} tokens/s")
    waits.legend(loc="lower right")
    try:
        figure.savefig(path, format="png", dpi=120)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from None
