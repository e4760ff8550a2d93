"""The client of a process of vLLM: a frontend inside it where the service is on this machine, or else one that calls over gRPC."""

from __future__ import annotations

import logging
import os
import socket
from typing import TYPE_CHECKING, Final, TypeAlias

from moeserve.addresses import parse_target
from moeserve.client.client import Client
from moeserve.engines.vllm.settings import IF_POSSIBLE, Settings
from moeserve.errors import ConfigError, MoEServeError, explained
from moeserve.programs.same_user import ask

if TYPE_CHECKING:  # the engine: where vLLM is, not all that it needs may be installed
    from moeserve.programs.embedded_client import EmbeddedClient

AnyClient: TypeAlias = "Client | EmbeddedClient"

#: a child of vLLM's own logger, so that its lines are among those of vLLM
_log: Final = logging.getLogger("vllm.moeserve")


def connect(settings: Settings) -> AnyClient:
    """A new client, to be used in this process alone; a line of vLLM's log says which one, and why.

    Raises ConfigError or another MoEServeError where settings.embedded is True and a frontend in this process cannot serve.
    """
    why: object = "moeserve.embedded is false"
    if settings.embedded:
        try:
            client = _embedded(settings)
        except MoEServeError as error:
            if settings.embedded is True:
                raise
            why = error
        else:
            _log.info("experts of %s: called by a frontend in this process", settings.target)
            return client
    _log.info("experts of %s: called over gRPC (%s)", settings.target, why)
    return Client(settings.target, settings.token, settings.tls, timeout=settings.timeout_s)


def _embedded(settings: Settings) -> EmbeddedClient:
    """One that knows what is served."""
    is_invited = ask(parse_target(settings.target)) is not None
    if settings.embedded == IF_POSSIBLE and not is_invited:
        raise ConfigError("no controller of the same user is there on this machine")
    try:
        from moeserve.programs.embedded_client import EmbeddedClient  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise explained(error, "moeserve.embedded") from None
    token = None if is_invited else settings.token
    name = f"{socket.gethostname()}-{os.getpid()} (vLLM)"
    client = EmbeddedClient(settings.target, token, settings.tls, settings.timeout_s, name=name)
    try:
        client.layers()
    except BaseException:
        client.close()
        raise
    return client
