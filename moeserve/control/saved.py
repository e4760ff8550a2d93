"""The saved state of a controller as bytes: JSON, with the release as the message that frontends get."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moeserve.control.assignments import Assignment
from moeserve.control.record import read_release, release_message
from moeserve.control.state import State
from moeserve.errors import MoEServeError
from moeserve.observe.audit import AuditEvent
from moeserve.v1 import control_service_pb2 as pb


class StateUnreadable(MoEServeError):
    """What another version of moeserve has saved: trying again does not help."""


@dataclass(frozen=True)
class Saved:
    """What the next incarnation of a controller must know beside the configuration.

    `service_id` names folders of sockets; `frontend_token` is the token of frontends that the controller starts;
    `frontend_keys` are the public keys that hosts accept; `control_port` is where the controller listens, 0 = nowhere yet;
    `events` are the latest of the audit log.
    """

    service_id: str
    frontend_token: str = field(repr=False)
    state: State
    frontend_keys: tuple[str, ...] = ()
    control_port: int = 0
    events: tuple[AuditEvent, ...] = ()

    def to_bytes(self) -> bytes:
        """JSON; `from_bytes` reads it."""
        state = self.state
        return json.dumps(
            {
                "service_id": self.service_id,
                "frontend_token": self.frontend_token,
                "control_port": self.control_port,
                "frontend_keys": self.frontend_keys,
                "release": base64.b64encode(release_message(state.release).SerializeToString()).decode(),
                "assignments": [[assignment.number, assignment.node] for assignment in state.assignments],
                "num_hosts": state.num_hosts,
                "last_epoch": state.last_epoch,
                "next_number": state.next_number,
                "copies": state.copies,
                "events": [vars(event) for event in self.events],
            }
        ).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Saved:
        """Reads `to_bytes`; trusted, because a writer of the store has full control of the cluster anyway. Raises StateUnreadable."""
        try:
            return cls._read(json.loads(data))
        except Exception as error:  # whatever another version has written otherwise
            raise StateUnreadable(
                f"the state of this service has been saved by another version of moeserve, and this one cannot read it "
                f"({type(error).__name__}: {error}): `moeserve deploy` starts the service anew, with the weights of its configuration"
            ) from error

    @classmethod
    def _read(cls, read: Mapping[str, Any]) -> Saved:
        state = State(
            read_release(pb.Release.FromString(base64.b64decode(read["release"]))),
            tuple(Assignment(number, node) for number, node in read["assignments"]),
            read["num_hosts"],
            read["last_epoch"],
            read["next_number"],
            read["copies"],
        )
        events = tuple(AuditEvent(**event) for event in read["events"])
        return cls(read["service_id"], read["frontend_token"], state, tuple(read["frontend_keys"]), read["control_port"], events)
