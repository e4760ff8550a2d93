"""`moeserve events`: show what was changed, why, and how it ended."""

from __future__ import annotations

import json
import time
from typing import Annotated

import typer

from moeserve.cli.columns import bytes_text
from moeserve.cli.signals import Ended
from moeserve.cli.streams import is_read, say
from moeserve.cli.target import AdminTokenFile, Target, TlsCa, admin_of
from moeserve.observe.audit import AuditEvent
from moeserve.observe.records import plain


def events(
    target: Target,
    admin_token_file: AdminTokenFile,
    follow: Annotated[bool, typer.Option("--follow", help="Go on with what is changed from now on, until Ctrl-C.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per line.")] = False,
    tls_ca: TlsCa = None,
) -> None:
    """Show the audit log: every change of placement, weights, copies and hosts, why, what it moved, how long it took, how it ended."""
    with admin_of(target, admin_token_file, tls_ca) as client:
        try:
            for event in client.events(follow=follow):
                say(json.dumps(plain(event)) if as_json else _line(event))
                if not is_read():
                    return
        except Ended as ended:
            raise typer.Exit(ended.exit_code) from None  # the normal end: no message


def _line(event: AuditEvent) -> str:
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event.time_unix_s))
    counted = ((event.moves, "moved"), (event.new, "more copy" if event.new == 1 else "more copies"))
    moved = [f"{count:,} {what}" for count, what in counted if count] + [f"{bytes_text(event.moved_bytes)} read"] * bool(event.moved_bytes)
    parts = (f"{event.outcome} in {event.duration_s:.1f} s, epoch {event.epoch}", *moved)
    failed = f": {event.error}" if event.error else ""
    return f"{when}  {event.kind} {event.what} ({event.why}): {', '.join(parts)}{failed}"
