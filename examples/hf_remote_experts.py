"""A Hugging Face model with its experts in a service: python examples/hf_remote_experts.py [FOLDER] [HOST:PORT].

Without an address, the example first starts a service with two expert hosts. The model here is loaded without its experts.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

import moeserve

TINY = Path(__file__).parent / "tiny-moe"


def main(folder: Path, target: str | None) -> None:
    """Generate some text, and print where the weights are."""
    config = {"model": {"checkpoint": folder}, "placement": {"num_hosts": 2}, "server": {"port": 0, "metrics_port": 0}}
    with ExitStack() as running:
        target = target or running.enter_context(moeserve.serve(config)).target
        model: Any = moeserve.load_model(folder, target)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        with torch.no_grad():
            tokens = model.generate(**tokenizer("The import statement", return_tensors="pt"), max_new_tokens=40, do_sample=False)
        print(tokenizer.decode(tokens[0]))
        with moeserve.Client(target) as client:
            held = sum(host.weights_bytes for host in client.stats().hosts)
            asked = sum(int(layer.processed.sum()) for layer in client.stats().layers)
        here = sum(weight.nbytes for weight in model.parameters())
        print(f"weights in this process {here / 2**20:.1f} MiB, on expert hosts {held / 2**20:.1f} MiB; experts computed {asked} times")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else TINY, sys.argv[2] if len(sys.argv) > 2 else None)
