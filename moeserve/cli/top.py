"""`moeserve top`: watch a running service."""

from __future__ import annotations

import json
import time
from typing import Annotated

import typer
from rich.console import Group
from rich.live import Live
from rich.text import Text

from moeserve.cli.columns import console
from moeserve.cli.signals import Ended
from moeserve.cli.streams import is_read
from moeserve.cli.target import Target, TlsCa, TokenFile, timeout_of, tls_of, token_of
from moeserve.cli.top_view import view
from moeserve.client import Client
from moeserve.errors import ConfigError, DeadlineExceeded, ExpertUnavailable
from moeserve.observe.summary import as_json as stats_as_json


def top(
    target: Target,
    once: Annotated[bool, typer.Option("--once", help="Show counts since the service started, once.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per line instead of tables.")] = False,
    interval_s: Annotated[float, typer.Option(help="Seconds between two updates.")] = 1.0,
    token_file: TokenFile = None,
    tls_ca: TlsCa = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for an answer.")] = 10.0,
) -> None:
    """Show hosts, layers, load per expert, drops, queue and latencies of a running service, until Ctrl-C."""
    if not 0 < interval_s <= 3600:
        raise ConfigError(f"--interval-s is {interval_s:g}; allowed: more than 0, at most 3600")
    with Client(target, token=token_of(token_file), tls=tls_of(tls_ca), timeout=timeout_of(timeout)) as client:
        try:
            _top(client, target, once, as_json, interval_s)
        except Ended as ended:
            raise typer.Exit(ended.exit_code) from None  # the normal end: no message


def _top(client: Client, target: str, once: bool, as_json: bool, interval_s: float) -> None:
    if as_json:
        _print_json(client, once, interval_s)
    elif once:
        shown = console()
        shown.print(view(target, client.stats(), None, shown.width))
    else:
        _show(client, target, interval_s)


def _print_json(client: Client, once: bool, interval_s: float) -> None:
    while True:
        print(json.dumps(stats_as_json(client.stats())), flush=True)
        if once or not is_read():
            return
        time.sleep(interval_s)


def _show(client: Client, target: str, interval_s: float) -> None:
    """The first answer must come; if the service goes away later, its last numbers stay until it is back."""
    shown = console()
    stats = client.stats()
    picture = view(target, stats, None, shown.width, shown.height)
    with Live(picture, console=shown, screen=shown.is_terminal, auto_refresh=False) as live:
        while is_read():
            time.sleep(interval_s)
            try:
                before, stats = stats, client.stats()
            except (ExpertUnavailable, DeadlineExceeded) as error:
                live.update(Group(Text(str(error), style="bold red"), picture), refresh=True)
                continue
            picture = view(target, stats, before, shown.width, shown.height)
            live.update(picture, refresh=True)
