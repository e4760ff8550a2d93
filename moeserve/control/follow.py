"""The messages between a controller and a following frontend: full state, so only the latest one matters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from moeserve.config import FrontendConfig
from moeserve.control.counted import counted_message, read_counted
from moeserve.control.record import (
    hosts_messages,
    read_balancing,
    read_busy,
    read_failing,
    read_hosts,
    read_release,
    release_message,
    require_counts,
    require_key,
    require_printable,
    require_short,
    require_times,
)
from moeserve.errors import ConfigError
from moeserve.observe.balancing import Balancing
from moeserve.observe.counted import Counted
from moeserve.observe.stats import HostInfo
from moeserve.release import Release
from moeserve.transport import KeyPair
from moeserve.v1 import control_service_pb2 as pb

_MAX_NAME_CHARS: Final = 256
_MAX_SENTENCE_CHARS: Final = 1000

#: tables for the controller only
_NOT_FOLLOWED: Final[dict[str, Any]] = {"placement": {"num_hosts", "node_labels", "node_strategy", "wait_for_nodes_s", "load_timeout_s"}}


def checked_name(name: Any) -> str:
    """The name of a frontend for people, "" = none. Raises ConfigError for one that no controller takes, before it is asked."""
    if not isinstance(name, str) or len(name) > _MAX_NAME_CHARS or not name.isprintable():
        raise ConfigError(f"the name of a frontend is {name!r:.80}; allowed: at most {_MAX_NAME_CHARS} printable characters")
    return name


@dataclass(frozen=True)
class Report:
    """The state of a frontend, sent to the controller.

    name, target and metrics_target are for status, node is its Ray node, public_key the key it was given earlier;
    new batches use `epoch`, running ones `oldest_epoch` or later (0 = it serves nothing yet); it is ready for the candidate of
    `tried_epoch`, or not: `refusal` says why. is_leaving = it ends for good, and does not come back with its key; is_ready = it accepts
    requests, and every expert can be reached; requested = what callers have asked of the experts since it started, as `packed_counts`;
    call_times = how long calls took, as `CallTimes` counts them, () = as yet nothing is known; counted = all that it has counted, where it
    has no page of its own.
    """

    name: str
    target: str = ""
    metrics_target: str = ""
    node: str = ""
    public_key: str = ""
    epoch: int = 0
    oldest_epoch: int = 0
    tried_epoch: int = 0
    refusal: str = ""
    is_leaving: bool = False
    is_ready: bool = False
    requested: tuple[bytes, ...] = ()
    call_times: tuple[int, ...] = ()
    counted: Counted | None = None

    def to_message(self) -> pb.FrontendReport:
        """For `from_message`."""
        counted = None if self.counted is None else counted_message(self.counted)
        return pb.FrontendReport(**{**vars(self), "refusal": self.refusal[:_MAX_SENTENCE_CHARS], "counted": counted})

    @classmethod
    def from_message(cls, message: pb.FrontendReport) -> Report:
        """Raises InvalidRequest when a text is too long, has control characters, or is not a key."""
        for name in ("name", "target", "metrics_target", "node"):
            require_short(getattr(message, name), name, _MAX_NAME_CHARS)
            require_printable(getattr(message, name), name)
        require_short(message.refusal, "refusal", _MAX_SENTENCE_CHARS)
        require_key(message.public_key, "public_key")
        require_counts(message.requested, "requested")
        require_times(message.call_times, "call_times")
        said = {name: getattr(message, name) for name in cls.__dataclass_fields__}
        counted = read_counted(message.counted) if message.HasField("counted") else None
        lists = {"requested": tuple(message.requested), "call_times": tuple(message.call_times)}
        return cls(**{**said, **lists, "counted": counted})


@dataclass(frozen=True)
class Setup:
    """Sent to a frontend once per stream: which deployment it follows, and how to serve.

    keys: its keys for hosts, None = it has keys; drain_timeout_s: how long batches may take to finish.
    """

    service_id: str
    config_json: str
    keys: KeyPair | None
    drain_timeout_s: float


@dataclass(frozen=True)
class Order:
    """The desired state of a frontend: serve `current` (None = not known yet), try `candidate`, if there is one, on `hosts`.

    `failing`: hosts that are down and not restarting, and why. For metrics: `balancing`; `busy`, the share of its time, 0..1,
    that each host has lately spent in passes; `wanted_hosts`, how many should run, and `missing_hosts`, how many of these have no room.
    """

    current: Release | None = None
    candidate: Release | None = None
    hosts: Mapping[int, HostInfo] = field(default_factory=dict)
    setup: Setup | None = None
    failing: Mapping[int, str] = field(default_factory=dict)
    balancing: Balancing = field(default_factory=Balancing)
    busy: Mapping[int, float] = field(default_factory=dict)
    wanted_hosts: int = 0
    missing_hosts: int = 0

    def to_message(self) -> pb.FrontendOrder:
        """For `from_message`."""
        failing = {number: why[:_MAX_SENTENCE_CHARS] for number, why in self.failing.items()}
        message = pb.FrontendOrder(hosts=hosts_messages(self.hosts), failing=failing, busy=self.busy)
        message.wanted_hosts, message.missing_hosts = self.wanted_hosts, self.missing_hosts
        message.balancing.CopyFrom(pb.Balancing(**vars(self.balancing)))
        for name, release in (("current", self.current), ("candidate", self.candidate)):
            if release is not None:
                getattr(message, name).CopyFrom(release_message(release))
        if (told := self.setup) is not None:
            keys = told.keys or KeyPair("", "")
            message.setup.CopyFrom(pb.Setup(config_json=told.config_json, public_key=keys.public, secret_key=keys.secret))
            message.setup.drain_timeout_s = told.drain_timeout_s
            message.setup.service_id = told.service_id
        return message

    @classmethod
    def from_message(cls, message: pb.FrontendOrder) -> Order:
        """Raises InvalidRequest for an impossible order."""
        told = message.setup
        for key in (told.public_key, told.secret_key):
            require_key(key, "setup.keys")
        keys = KeyPair(told.public_key, told.secret_key) if told.public_key and told.secret_key else None
        return cls(
            current=read_release(message.current) if message.HasField("current") else None,
            candidate=read_release(message.candidate) if message.HasField("candidate") else None,
            hosts=read_hosts(list(message.hosts)),
            failing=read_failing(message.failing),
            balancing=read_balancing(message.balancing),
            busy=read_busy(message.busy),
            wanted_hosts=message.wanted_hosts,
            missing_hosts=message.missing_hosts,
            setup=Setup(told.service_id, told.config_json, keys, told.drain_timeout_s) if message.HasField("setup") else None,
        )


def followed_config(config: FrontendConfig) -> str:
    """The shared configuration of all frontends, as JSON. Unset keys stay unset, because that has a meaning."""
    return config.model_dump_json(include=set(FrontendConfig.model_fields), exclude=_NOT_FOLLOWED, exclude_unset=True)
