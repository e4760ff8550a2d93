"""The Python that has vLLM and this moeserve's client."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PYTHON = os.environ.get("MOESERVE_VLLM_PYTHON", "")
needs_vllm = pytest.mark.skipif(not PYTHON, reason="MOESERVE_VLLM_PYTHON is not set: make test-vllm")
#: one thread that is bound to no core: other programs run here, too
QUIET = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def environment(**more: str) -> dict[str, str]:
    """Of a process with vLLM: nothing of ours but what is installed there, and no downloads."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "MOESERVE_", "OMP_"))}
    return {**ours, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", **QUIET, **more}


def free_port() -> int:
    """For a program that does not say which one it took."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])
