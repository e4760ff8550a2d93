"""`moeserve ping`: ask which process answers, and whether it is ready."""

from __future__ import annotations

from typing import Annotated

import typer

from moeserve.cli.app import EXIT_UNREACHABLE
from moeserve.cli.streams import say
from moeserve.cli.target import Target, TlsCa, TokenFile, timeout_of, tls_of, token_of
from moeserve.client import AdminClient
from moeserve.errors import DeadlineExceeded, ExpertUnavailable, ServiceUnreachable


def ping(
    target: Target,
    token_file: TokenFile = None,
    tls_ca: TlsCa = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for an answer.")] = 5.0,
) -> int:
    """Print the role, version and epoch of the process that answers, and whether it is ready or why not, in one line.

    Exit code 0: ready. 3: not ready, or no answer.
    """
    try:
        with AdminClient(target, token_of(token_file) or "", tls=tls_of(tls_ca)) as client:
            who = client.ping(timeout_of(timeout))
    except (DeadlineExceeded, ExpertUnavailable) as error:
        raise ServiceUnreachable(str(error)) from None
    say(f"{target}: {who.role}, moeserve {who.version}, epoch {who.epoch}, {'ready' if who.is_ready else f'not ready: {who.reason}'}")
    return 0 if who.is_ready else EXIT_UNREACHABLE
