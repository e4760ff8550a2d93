"""A frontend in a process of its own: `python -m tests.transport.frontend_process SILENT_AFTER_S ENDPOINT...`.

Again and again it sends work that the host keeps to each endpoint, says `sent`, then `turn` every now and then, and how each was answered.
"""

from __future__ import annotations

import asyncio
import sys

from moeserve.transport import connect
from tests.transport.host_process import Order
from tests.transport.rig import PATIENCE_S, random_message, send


async def main() -> None:
    silent_after_s, *endpoints = sys.argv[1:]
    channels = [await connect(endpoint, timeout_s=PATIENCE_S, silent_after_s=float(silent_after_s)) for endpoint in endpoints]
    while True:
        answers = [send(channel, random_message(), layer=Order.KEEP) for channel in channels]
        print("sent", flush=True)
        while not all(answered.done() for answered in answers):
            await asyncio.sleep(0.02)
            print("turn", flush=True)
        print(*("answered" if answered.exception() is None else answered.exception() for answered in answers), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
