"""Messages that no client of moeserve would send, from a seed: noise, pieces, changed bytes, and fields that contradict each other."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from functools import cache
from typing import Final

import torch
from running import EXPERTS, HIDDEN, LAYERS

from moeserve.api.wire import WireRequest, encode_forward_request
from moeserve.v1 import admin_service_pb2, control_service_pb2, moe_service_pb2, tensor_pb2

EDGES: Final = (0, 1, -1, 2, 3, 8, 63, 64, 65, 2**31 - 1, 2**31, -(2**31), 2**32 - 1, 2**32, 2**40, 2**62, 2**63 - 1, -(2**63))
FLOATS: Final = (float("nan"), float("inf"), -float("inf"), 3e38, 1e-45, -1.0, 0.0, 5e-324, 1e308, 1.5)
_SIZES: Final = {1: 4, 2: 2, 3: 2, 4: 8, 5: 4, 6: 1}
_TEXTS: Final = ("", "a", "layers.0", "../../etc/passwd", "\0", "é" * 300, "x" * 5000, "x" * 200_000, "a\n2026 ERROR forged", "%s%n{0}")


@cache
def _valid() -> list[bytes]:
    return [encode_forward_request(WireRequest(torch.ones(count, HIDDEN), layer=layer)) for count in (1, 3, 700) for layer in range(LAYERS)]


class Hostile:
    """One source of everything."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)

    def noise(self, *sizes: int) -> bytes:
        return self.chance.randbytes(self.chance.choice(sizes))

    def text(self) -> str:
        return self.chance.choice(_TEXTS)

    def forward(self) -> bytes:
        """For Forward and ForwardStream."""
        chance = self.chance
        valid = bytearray(chance.choice(_valid()))
        pieces = bytes(valid[: chance.randrange(len(valid))])
        at = chance.randrange(60)
        valid_and_more = bytes(valid[:at]) + self.noise(0, 1, 3) + bytes(valid[at:]) + self.noise(0, 1, 5)
        kinds: dict[int, Callable[[], bytes]] = {
            0: lambda: self.noise(0, 1, 2, 5, 50, 500, 2000),
            1: lambda: pieces,
            2: lambda: self.changed(valid),
            3: lambda: self.changed(valid),
            4: lambda: self._nested(chance.choice((10, 50, 3000))),
            5: lambda: bytes(valid) + self._structured(),
            6: lambda: valid_and_more,
        }
        return kinds.get(chance.randrange(10), self._structured)()

    def changed(self, message: bytearray) -> bytes:
        for _ in range(self.chance.choice((1, 2, 8))):
            message[self.chance.randrange(min(len(message), self.chance.choice((20, len(message)))))] = self.chance.randrange(256)
        return bytes(message)

    def _nested(self, depth: int) -> bytes:
        if self.chance.random() < 0.3:
            return self.chance.choice((b"\x2b" * depth, b"\x0a\xff\xff\xff\xff\x0f" + self.noise(10), b"\x2a" + b"\x80" * 12 + b"\x01"))
        message = b""
        for _ in range(depth):
            size, length = len(message), b""
            while size > 127:
                length += bytes([size & 127 | 128])
                size >>= 7
            message = b"\x2a" + length + bytes([size]) + message
        return message

    def _tensor(self, rows: int, columns: int, dtypes: tuple[int, ...]) -> tensor_pb2.Tensor:
        chance = self.chance
        dtype = chance.choice((*dtypes, *dtypes, *dtypes, 0, 7, 99))
        shape = [rows, columns] if chance.random() < 0.7 else [chance.choice(EDGES) for _ in range(chance.choice((0, 1, 2, 3, 9, 200)))]
        count = 1
        for size in shape:
            count *= max(0, size)
        size = _SIZES.get(dtype, 4)
        nbytes = count * size if count * size < 300_000 else 1000
        nbytes = max(0, nbytes + chance.choice((0, 0, 0, 0, -1, 1, 4, -4)))
        if chance.random() < 0.3:
            data = chance.randbytes(nbytes)
        elif chance.random() < 0.3:
            data = struct.pack("<f", chance.choice(FLOATS[:5])) * (nbytes // 4)
        else:
            data = bytes(nbytes)
        return tensor_pb2.Tensor(dtype=dtype, shape=shape, data=data)  # type: ignore[arg-type]

    def _structured(self) -> bytes:
        chance = self.chance
        request, rows, top_k = moe_service_pb2.ForwardRequest(), chance.choice((0, 1, 2, 5)), chance.choice((0, 1, 2, EXPERTS, EXPERTS + 1))
        if chance.random() < 0.5:
            request.request_id = self.text()
        if chance.random() < 0.1:
            request.model = self.text()
        if chance.random() < 0.6:
            request.layer_index = chance.choice((0, 1, LAYERS, 2**32 - 1))
        elif chance.random() < 0.8:
            request.layer_name = self.text()
        for name, columns, dtypes, share in (
            ("hidden_states", chance.choice((HIDDEN, HIDDEN, HIDDEN, 0, HIDDEN - 1)), (1, 2, 3), 0.95),
            ("used_token", 1, (6,), 0.2),
            ("topk_ids", top_k, (4, 5), 0.4),
            ("topk_weights", top_k, (1, 2), 0.4),
            ("token_ids", 1, (4, 5), 0.2),
        ):
            if chance.random() < share:
                getattr(request, name).CopyFrom(self._tensor(rows, columns, dtypes))
        if chance.random() < 0.3:
            request.return_routing = True
        if chance.random() < 0.2:
            request.capacity_factor = chance.choice(FLOATS)
        if chance.random() < 0.2:
            request.noise = self.text()
        if chance.random() < 0.2:
            request.seed = chance.choice((0, 1, 2**63, 2**64 - 1))
        return request.SerializeToString()

    def report(self) -> bytes:
        """For Follow."""
        report, chance = control_service_pb2.FrontendReport(), self.chance
        for name in ("name", "target", "metrics_target", "node", "public_key", "refusal"):
            if chance.random() < 0.4:
                setattr(report, name, self.text())
        for name in ("epoch", "oldest_epoch", "tried_epoch"):
            if chance.random() < 0.4:
                setattr(report, name, chance.choice((0, 1, 2, 2**63, 2**64 - 1)))
        return chance.choice((report.SerializeToString(), self.noise(0, 5, 100, 20_000)))

    def change(self) -> tuple[str, bytes]:
        """A method of AdminService and what it is asked: nothing that is possible."""
        chance = self.chance
        swap = admin_service_pb2.SwapExpertsRequest(
            layer=self.text()[:5000],
            checkpoint=chance.choice(("", "relative", "/nowhere", "/proc", "/" + self.text()[:3000])),
            experts=[chance.choice((0, EXPERTS - 1, EXPERTS, 2**32 - 1)) for _ in range(chance.choice((0, 1, 1000)))],
        )
        drain = admin_service_pb2.DrainHostRequest(host=chance.choice(("", "host-99", "host--1")) + self.text()[:2000])
        asked = {"SwapExperts": swap.SerializeToString(), "DrainHost": drain.SerializeToString(), "Scale": b"", "GetPlacement": b""}
        method = chance.choice(tuple(asked))
        return method, b"\xff" + self.noise(1, 3, 20, 300) if chance.random() < 0.3 else asked[method]
