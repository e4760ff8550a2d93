"""What is compiled around the experts says bit by bit what torch's and NumPy's operators say, which take its place where there is none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeserve import kernels
from moeserve.api.tensors import is_finite
from moeserve.config import GatingConfig, PlacementConfig, load_config
from moeserve.errors import InvalidRequest
from moeserve.experts import ExpertBank
from moeserve.gating import route
from moeserve.layer.dispatch import SharedWork, combine, plan
from moeserve.placement import LayerPlacement, plan_placement
from tests.experts.oracle import random_experts

SEEDS = st.integers(0, 2**32)
MODULES = ("dispatch", "rows")


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """In `with bare.context() as machine: without(machine)`, nothing is compiled."""
    return monkeypatch


def without(machine: pytest.MonkeyPatch) -> None:
    for name in MODULES:
        machine.setattr(f"moeserve.kernels.{name}.library", lambda: None)
