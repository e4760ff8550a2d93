"""`moeserve rebalance`: move experts and add copies now, to fit the load."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from moeserve.cli.streams import say
from moeserve.cli.target import AdminTokenFile, Target, TlsCa, admin_of
from moeserve.errors import number_of
from moeserve.observe.records import plain
from moeserve.observe.status import Rebalanced


def rebalance(
    target: Target,
    admin_token_file: AdminTokenFile,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would move.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    tls_ca: TlsCa = None,
) -> None:
    """Do one round of balancing: experts that are in demand get more copies, and the hosts get about equal work.

    No request fails meanwhile.
    """
    with admin_of(target, admin_token_file, tls_ca) as client:
        done = client.rebalance(dry_run=dry_run)
    if as_json:
        print(json.dumps(plain(done)))
    else:
        say(_sentence(done, "would move" if dry_run else "moved"))


def _sentence(done: Rebalanced, moved: str) -> str:
    even = f"balancedness of the hosts {done.balancedness_before:.3f}"
    if not done.steps:
        return f"epoch {done.epoch}: nothing {moved}; {even}"
    changes = f"{number_of(done.moves, 'expert')} {moved}, {number_of(done.new, 'new copy')}, {done.kept} stay"
    return (
        f"epoch {done.epoch}: {changes}; {done.moved_bytes / 2**20:.1f} MiB in {number_of(done.steps, 'step')}; "
        f"{even} -> {done.balancedness:.3f}"
    )
