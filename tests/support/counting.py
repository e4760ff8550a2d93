"""Between a client and a service: how much passes through their connection."""

from __future__ import annotations

import asyncio

from moeserve.loops import LoopThread


class Counting:
    """Passes a connection on, and counts its bytes in both directions."""

    def __init__(self, port: int) -> None:
        self.nbytes, self._port = 0, port
        self._thread = LoopThread("counting")
        self._thread.start()
        self._server = self._thread.call(self._listen())
        self.target = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _listen(self) -> asyncio.Server:
        return await asyncio.start_server(self._joined, "127.0.0.1", 0)

    async def _joined(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            await asyncio.gather(self._pump(reader, there[1]), self._pump(there[0], writer))
        finally:
            for one in (writer, there[1]):
                one.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(2**16):
            self.nbytes += len(data)
            writer.write(data)
        writer.close()

    def stop(self) -> None:
        self._thread.call(self._end())
        self._thread.stop()

    async def _end(self) -> None:
        self._server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
