"""`moeserve swap`: replace weights without a pause."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moeserve.cli.streams import say
from moeserve.cli.target import AdminTokenFile, Target, TlsCa, admin_of, layer_of, number_in


def swap(
    target: Target,
    checkpoint: Annotated[Path, typer.Option(help="Checkpoint folder of the same model, at this path for the service and its hosts.")],
    admin_token_file: AdminTokenFile,
    layer: Annotated[str, typer.Option(help="Position of the layer (0 = the first MoE layer) or its name; without it: all layers.")] = "",
    experts: Annotated[str, typer.Option(help="Only these, for example 0,5,7; all of the layer and its gate if none are named.")] = "",
    tls_ca: TlsCa = None,
) -> None:
    """Replace the weights of all layers, of one layer, or of some of its experts with those of a checkpoint folder.

    No request fails meanwhile.
    """
    ids = [_expert(part) for part in experts.split(",") if part.strip()]
    with admin_of(target, admin_token_file, tls_ca) as client:
        done = client.swap(layer_of(layer), checkpoint.resolve(), ids)
    what = f"layer {layer} has revision {done.model_revision}" if layer else "all layers have new weights"
    say(f"{what} since epoch {done.epoch}")


def _expert(text: str) -> int:
    number = number_in(text.strip())
    if number is None:
        raise typer.BadParameter(f"{text.strip()!r} is not the number of an expert", param_hint="--experts")
    return number
