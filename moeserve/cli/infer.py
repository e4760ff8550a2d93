"""`moeserve infer`: send a token batch from a file, and write the answer to a file."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from moeserve.cli.signals import preparing
from moeserve.cli.streams import say
from moeserve.cli.target import Target, TlsCa, TokenFile, layer_of, timeout_of, tls_of, token_of
from moeserve.client import Client
from moeserve.errors import ConfigError


def infer(
    target: Target,
    layer: Annotated[str, typer.Option(help="Position of the layer (0 = the first MoE layer) or its name.")],
    input: Annotated[
        Path, typer.Option(help="safetensors file with hidden_states, optionally used_token, topk_ids, topk_weights, token_ids.")
    ],
    output: Annotated[Path, typer.Option(help="safetensors file to write: hidden_states, requested, processed, dropped, dropped_tokens.")],
    return_routing: Annotated[
        bool, typer.Option("--return-routing", help="Also write the routing: topk_ids, topk_weights, slots, drop_reasons.")
    ] = False,
    capacity_factor: Annotated[float | None, typer.Option(help="Instead of the layer's; inf = no limit.")] = None,
    noise: Annotated[str | None, typer.Option(help="Instead of the layer's.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of random numbers, instead of the layer's.")] = None,
    token_file: TokenFile = None,
    tls_ca: TlsCa = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the answer.")] = 30.0,
) -> None:
    """Send one token batch from a file through one layer and write the answer to a file."""
    with preparing():
        import torch
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        from moeserve.api.wire import REQUEST_TENSORS

    try:
        tensors = load_file(input)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{input} is not a readable safetensors file: {error}") from None
    if "hidden_states" not in tensors:
        raise ConfigError(f"{input} has no tensor hidden_states; it has: {', '.join(sorted(tensors)) or 'none'}")
    given: dict[str, Any] = {name: tensors[name] for name in REQUEST_TENSORS if name in tensors}
    with Client(target, token=token_of(token_file), tls=tls_of(tls_ca), timeout=timeout_of(timeout), retry=False) as client:
        started = time.perf_counter()
        out = client.forward(
            **given,
            layer=layer_of(layer),
            return_routing=return_routing,
            capacity_factor=capacity_factor,
            noise=noise,
            seed=seed,
        )
        elapsed_ms = (time.perf_counter() - started) * 1000
    answer = {name: value for name, value in vars(out).items() if isinstance(value, torch.Tensor)}
    _write(answer, output)
    say(f"{len(out.hidden_states)} tokens in {elapsed_ms:.1f} ms, {int(out.dropped.sum())} choices dropped -> {output}")


def _write(answer: dict[str, Any], output: Path) -> None:
    """A file is replaced as a whole, where a link leads; a device or a pipe stays what it is. Raises ConfigError."""
    from safetensors import SafetensorError
    from safetensors.torch import save, save_file

    try:
        if output.exists() and not output.is_file():
            output.write_bytes(save(answer))
        else:
            save_file(answer, output.resolve())
    except (OSError, RuntimeError, SafetensorError) as error:  # RuntimeError: links in a circle, before Python 3.13
        raise ConfigError(f"--output {output} cannot be written: {error}") from None
