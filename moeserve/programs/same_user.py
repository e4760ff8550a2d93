"""How programs of the same user on the same machine follow a controller without being given a token: they ask it on a socket of their own.

The socket has no file: its name is in Linux' abstract namespace, which belongs to the network as the controller's port does. The kernel
tells each end the user of the other one.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Final

from moeserve.addresses import Target
from moeserve.memory import is_same_user

log = logging.getLogger(__name__)

_MAX_BYTES: Final = 4096
_TIMEOUT_S: Final = 1.0
#: a program of this user that listens there will answer, but its event loop may be busy
_ANSWER_TIMEOUT_S: Final = 20.0


@dataclass(frozen=True)
class Invitation:
    """What a program needs to follow: a frontend token, and its node, where hosts are reached through memory.

    `files` is what the controller calls its view of the file system: elsewhere, as in another container, sockets of hosts are not found.
    """

    token: str
    node: str
    files: int


class SameUserDoor:
    """Gives `token` and `node` to programs of this user that ask for the controller at `port`, from `open` to `close`."""

    def __init__(self, token: str, node: str) -> None:
        self._answer = json.dumps(asdict(Invitation(token, node, _files()))).encode()
        self._server: asyncio.Server | None = None

    async def open(self, port: int) -> None:
        """A name that is taken, as by a service with the same port at another address, is left to whoever has it."""
        try:
            self._server = await asyncio.start_unix_server(self._invite, path=_name(port))
        except OSError as error:
            log.warning("programs of this user need a token to follow: the socket for port %d cannot be opened: %s", port, error.strerror)

    def close(self) -> None:
        """Nobody is let in any more."""
        if self._server is not None:
            self._server.close()

    async def _invite(self, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            if is_same_user(writer.get_extra_info("socket")):
                writer.write(self._answer)
                await writer.drain()
        writer.close()


def ask(controller: Target) -> Invitation | None:
    """The invitation of the controller at this address; None = it is elsewhere, or of another user, or not there."""
    if not controller.is_here or len({port for _, port in controller.hosts}) != 1:
        return None
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock, suppress(OSError, ValueError, TypeError):
        sock.settimeout(_TIMEOUT_S)
        sock.connect(_name(controller.hosts[0][1]))
        if is_same_user(sock):
            sock.settimeout(_ANSWER_TIMEOUT_S)
            told = b""
            while len(told) <= _MAX_BYTES and (more := sock.recv(_MAX_BYTES)):
                told += more
            invitation = Invitation(**json.loads(told))
            return invitation if invitation.files == _files() else None
    return None


def _name(port: int) -> str:
    return f"\0moeserve/{os.getuid()}/{port}"


def _files() -> int:
    return os.stat("/proc/self/ns/mnt").st_ino
