"""Releases and hosts as protobuf messages: saved by controllers, sent to frontends, and checked when read.

P physical experts of a layer, U units.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from moeserve.checkpoints import FileMark, Fingerprint, Swap
from moeserve.config import MAX_EXPERTS, MAX_HOSTS, MAX_LAYERS, MAX_PHYSICAL
from moeserve.errors import InvalidRequest
from moeserve.observe.balancing import Balancing
from moeserve.observe.call_times import NUM_TIMES
from moeserve.observe.records import plain, read
from moeserve.observe.stats import HostInfo
from moeserve.placement import LayerPlacement, Placement
from moeserve.release import Release
from moeserve.v1 import control_service_pb2 as pb

#: bounds on messages, far above those of any service
_MAX_SWAPS: Final = 2**20
_MAX_FILES: Final = 2**20
_MAX_PATH_CHARS: Final = 2**12
_MAX_ENDPOINTS: Final = 16
_KEY_CHARS: Final = 40


def release_message(release: Release) -> pb.Release:
    """For `read_release`."""
    placement = release.placement
    made_of = [*release.deployed.values(), *(swap.fingerprint for swap in release.swaps if swap.fingerprint is not None)]
    position = {file: number for number, file in enumerate(dict.fromkeys(file for each in made_of for file in each.files))}
    return pb.Release(
        epoch=placement.epoch,
        num_hosts=placement.num_hosts,
        layers=[
            pb.LayerPlacement(
                unit_of_physical=_packed(layer.unit_of_physical),
                host_of_physical=_packed(layer.host_of_physical),
                tensor_parallel=layer.tensor_parallel,
            )
            for layer in placement.layers
        ],
        swaps=[
            pb.Swap(
                layer=swap.layer,
                checkpoint=str(swap.checkpoint),
                experts=sorted(swap.experts or ()),
                revision=swap.revision,
                files=[position[file] for file in swap.fingerprint.files] if swap.fingerprint is not None else (),
            )
            for swap in release.swaps
        ],
        files=[pb.FileMark(**vars(file)) for file in position],
        deployed=[pb.Deployed(layer=layer, files=[position[file] for file in each.files]) for layer, each in release.deployed.items()],
    )


def read_release(message: pb.Release) -> Release:
    """Raises InvalidRequest unless it can be served."""
    _require(message.epoch >= 1, "epoch", "at least 1")
    _require(1 <= message.num_hosts <= MAX_HOSTS, "num_hosts", f"1..{MAX_HOSTS}")
    _require(1 <= len(message.layers) <= MAX_LAYERS, "layers", f"1..{MAX_LAYERS} of them")
    _require(len(message.swaps) <= _MAX_SWAPS, "swaps", f"at most {_MAX_SWAPS}")
    layers = tuple(_read_layer(layer, message.num_hosts) for layer in message.layers)
    _require(len(message.files) <= _MAX_FILES, "files", f"at most {_MAX_FILES}")
    files = [_read_file(file) for file in message.files]
    swaps = tuple(_read_swap(swap, files) for swap in message.swaps)
    deployed = {each.layer: _read_fingerprint(each.files, files) for each in message.deployed}
    return Release(Placement(message.epoch, message.num_hosts, layers), swaps, deployed)


def _read_layer(message: pb.LayerPlacement, num_hosts: int) -> LayerPlacement:
    units, hosts = _unpacked(message.unit_of_physical, "unit_of_physical"), _unpacked(message.host_of_physical, "host_of_physical")
    _require(len(units) == len(hosts), "host_of_physical", "as many as unit_of_physical")
    _require(bool((hosts >= 0).all() and (hosts < num_hosts).all()), "host_of_physical", f"0..{num_hosts - 1}")
    _require(bool((np.diff(hosts) >= 0).all()), "host_of_physical", "ascending")
    # Every unit exists at least once, so there are at most P.
    _require(bool((units >= 0).all() and (units < len(units)).all()), "unit_of_physical", f"0..{len(units) - 1}")
    _require(bool(np.bincount(units).all()), "unit_of_physical", "every unit at least once")
    shards = message.tensor_parallel
    _require(shards >= 1 and (int(units.max()) + 1) % shards == 0, "tensor_parallel", "a divisor of the number of units")
    return LayerPlacement(num_hosts, units, hosts, shards)


def _read_swap(message: pb.Swap, files: Sequence[FileMark]) -> Swap:
    _require(bool(message.layer), "swaps.layer", "the name of a layer")
    _require(Path(message.checkpoint).is_absolute(), "swaps.checkpoint", "the absolute path of a folder")
    _require(message.revision >= 2, "swaps.revision", "at least 2")
    fingerprint = _read_fingerprint(message.files, files) if message.files else None
    return Swap(message.layer, Path(message.checkpoint), frozenset(message.experts) or None, message.revision, fingerprint)


def _read_file(message: pb.FileMark) -> FileMark:
    require_short(message.path, "files.path", _MAX_PATH_CHARS)
    return FileMark(message.path, message.size, message.description, message.numbers)


def _read_fingerprint(positions: Sequence[int], files: Sequence[FileMark]) -> Fingerprint:
    _require(all(position < len(files) for position in positions), "files", f"positions below {len(files)}")
    return Fingerprint(tuple(files[position] for position in positions))


def host_message(number: int, info: HostInfo) -> pb.Host:
    """For `read_hosts`."""
    return pb.Host(number=number, **plain(info))


def read_hosts(messages: list[pb.Host]) -> dict[int, HostInfo]:
    """Hosts by number. Raises InvalidRequest when an entry is invalid."""
    hosts: dict[int, HostInfo] = {}
    for message in messages:
        _require(message.number < MAX_HOSTS and message.number not in hosts, "hosts.number", f"below {MAX_HOSTS}, each once")
        _require(1 <= len(message.endpoints) <= _MAX_ENDPOINTS, "hosts.endpoints", f"1..{_MAX_ENDPOINTS} of them")
        require_key(message.public_key, "hosts.public_key")
        hosts[message.number] = read(HostInfo, message)
    return hosts


def read_failing(failing: Mapping[int, str]) -> dict[int, str]:
    """Why hosts are down, by number. Raises InvalidRequest when an entry is invalid."""
    _require(all(number < MAX_HOSTS for number in failing), "failing", f"numbers below {MAX_HOSTS}")
    return dict(failing)


def read_busy(busy: Mapping[int, float]) -> dict[int, float]:
    """How busy hosts are, by number. Raises InvalidRequest when an entry is invalid."""
    _require(all(number < MAX_HOSTS for number in busy), "busy", f"numbers below {MAX_HOSTS}")
    _require(all(0 <= share <= 1 for share in busy.values()), "busy", "shares of 0..1")
    return dict(busy)


def read_balancing(message: pb.Balancing) -> Balancing:
    """Raises InvalidRequest when a text has control characters."""
    for text in (message.latest, message.changing):
        require_printable(text, "balancing")
    numbers = dict(message.rounds), message.moved_experts, message.moved_bytes, tuple(message.balancedness)
    return Balancing(*numbers, message.latest, message.changing)


def hosts_messages(hosts: Mapping[int, HostInfo]) -> list[pb.Host]:
    """For `read_hosts`."""
    return [host_message(number, info) for number, info in hosts.items()]


def require_key(key: str, field: str) -> None:
    """Raises InvalidRequest unless it is empty or has the form of a key."""
    _require(not key or (len(key) == _KEY_CHARS and key.isascii() and key.isprintable()), field, f"{_KEY_CHARS} characters of Z85, or none")


def require_counts(layers: Sequence[bytes], field: str) -> None:
    """Raises InvalidRequest unless each has the form of `packed_counts`."""
    _require(len(layers) <= MAX_LAYERS, field, f"at most {MAX_LAYERS} layers")
    for counts in layers:
        _require(8 <= len(counts) <= 8 * MAX_EXPERTS and len(counts) % 8 == 0, field, f"1..{MAX_EXPERTS} numbers of 8 bytes each")


def require_times(counts: Sequence[int], field: str) -> None:
    """Raises InvalidRequest unless they are as `CallTimes` counts, or none."""
    _require(len(counts) in (0, NUM_TIMES), field, f"{NUM_TIMES} counts, or none")
    _require(all(count < 2**48 for count in counts), field, "counts below 2**48")


def packed_counts(layers: Iterable[npt.NDArray[np.int64]]) -> tuple[bytes, ...]:
    """For `read_counts`: of each layer, a count [E] of each expert."""
    return tuple(counts.astype("<i8").tobytes() for counts in layers)


def read_counts(layers: Sequence[bytes]) -> list[npt.NDArray[np.int64]]:
    """[E] of each layer; `require_counts` has been called."""
    return [np.frombuffer(counts, "<i8").astype(np.int64) for counts in layers]


def require_short(text: str, field: str, max_chars: int) -> None:
    """Raises InvalidRequest when it is longer than that."""
    _require(len(text) <= max_chars, field, f"at most {max_chars} characters")


def require_printable(text: str, field: str) -> None:
    """Raises InvalidRequest when it has line ends or other control characters."""
    _require(text.isprintable(), field, "printable characters")


def _packed(numbers: npt.NDArray[np.integer]) -> bytes:
    return numbers.astype("<i4").tobytes()


def _unpacked(numbers: bytes, field: str) -> npt.NDArray[np.int64]:
    _require(4 <= len(numbers) <= 4 * MAX_PHYSICAL and len(numbers) % 4 == 0, field, f"1..{MAX_PHYSICAL} numbers of 4 bytes each")
    return np.frombuffer(numbers, "<i4").astype(np.int64)


def _require(is_so: bool, field: str, allowed: str) -> None:
    if not is_so:
        raise InvalidRequest(f"{field} is invalid; allowed: {allowed}", field)
