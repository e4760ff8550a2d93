"""A service in a thread of this program: for notebooks, tests and scripts."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from moeserve.config import ServiceConfig, load_config
from moeserve.errors import MoEServeError, ServiceUnreachable
from moeserve.loops import LoopThread
from moeserve.programs.serve import Progress, Service, log
from moeserve.release import Release


class BackgroundService:
    """`with serve(...) as service: Client(service.target)`; leaving the block stops the service."""

    def __init__(self, config: ServiceConfig, progress: Progress) -> None:
        self._service = Service(config, progress)
        self._thread = LoopThread("moeserve")
        #: reentrant, because a signal's handler may stop it, too
        self._stopping = threading.RLock()
        self._changes: set[Future[Release]] = set()

    @property
    def target(self) -> str:
        """host:port of the gRPC service."""
        return self._service.target

    @property
    def metrics_target(self) -> str:
        """host:port of the Prometheus endpoint."""
        return self._service.metrics_target

    @property
    def failure(self) -> MoEServeError | None:
        """Why the service cannot continue and has ended, or is about to. None = it runs, or was asked to stop."""
        return self._service.failure

    def start(self) -> None:
        """Blocks until the service is ready; Ctrl-C undoes the start. Raises what `Service.start` raises."""
        self._thread.start()
        starting: list[asyncio.Task[None]] = []
        try:
            self._thread.call(_begin(self._service, starting))
        except BaseException:
            self._thread.call(_undo(self._service, starting))
            self._thread.stop()
            raise
        self._ending = self._thread.submit(self._stop_when_asked())

    def stop(self) -> None:
        """Drain, then stop everything; idempotent, and from any thread. A service that cannot continue stops by itself: see `failure`.

        On the service's own thread, as of a handler of its log records, it returns at once: the service ends when that goes on.
        """
        if self._thread.is_here:
            self._service.controller.ask_to_stop()
            return
        with self._stopping:
            if self._thread.is_running:
                self._thread.soon(self._service.controller.ask_to_stop)
                try:
                    self._ending.result()
                finally:
                    if self._ending.done():  # or it goes on ending, as after Ctrl-C
                        self._leave()

    def _leave(self) -> None:
        for change in [*self._changes]:
            change.cancel()
        self._thread.stop()

    async def _stop_when_asked(self) -> None:
        try:
            await self._service.over()
        except MoEServeError as error:
            log.error("%s", error)
        await self._service.stop()

    def swap(self, layer: str, checkpoint: str | Path, experts: Sequence[int] | None = None) -> int:
        """Serve a layer, or some of its experts, with the weights of another folder; no request fails meanwhile.

        Returns the layer's new revision (`model_revision` of answers). Raises MoEServeError; then nothing has changed.
        """
        return self._change(self._service.controller.swap(layer, Path(checkpoint), experts)).revision(layer)

    def scale(self, num_hosts: int | Literal["all"]) -> int:
        """Change the number of hosts; "all" = as many as fit on the nodes. No request fails meanwhile.

        Returns the epoch. Raises ConfigError.
        """
        return self._change(self._service.controller.scale(num_hosts)).epoch

    def drain_host(self, host: str) -> int:
        """Move the experts of a host to the others, then remove it; no request fails meanwhile. Returns the epoch. Raises ConfigError."""
        return self._change(self._service.controller.drain(host)).epoch

    def _change(self, change: Coroutine[Any, Any, Release]) -> Release:
        if self._thread.is_here:
            change.close()
            raise MoEServeError(
                "a service cannot be changed on its own thread, as by a handler of its log records: it would wait for itself"
            )
        with self._stopping:
            if self.failure is not None or not self._thread.is_running:
                change.close()
                raise self.failure or ServiceUnreachable(f"this service at {self.target} has been stopped")
            future = self._thread.submit(change)
            self._changes.add(future)
        try:
            return future.result()
        except CancelledError:
            raise ServiceUnreachable("this service was stopped meanwhile") from None
        finally:
            self._changes.discard(future)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()


async def _begin(service: Service, starting: list[asyncio.Task[None]]) -> None:
    starting.append(asyncio.create_task(service.start()))
    await starting[0]


async def _undo(service: Service, starting: list[asyncio.Task[None]]) -> None:
    for task in starting:
        task.cancel()
        await asyncio.wait({task})
        if not task.cancelled() and task.exception() is None:  # Ctrl-C came when it was ready
            await service.stop()


def serve(
    source: str | Path | Mapping[str, Any] | ServiceConfig,
    progress: Progress = log.info,
    cluster: Literal["ray", "threads"] | None = None,
) -> BackgroundService:
    """Start a service from a TOML file, a checkpoint folder or a mapping, in this process; blocks until it is ready.

    `cluster` overrides `cluster.kind` of the source. "ray" starts a local Ray if this process is not connected to one.
    "threads" needs no Ray and is ready in about two seconds: hosts are threads of this process, not pinned to cores, and a crash of one
    is a crash of all. Use it as a context manager, or call `stop`. Raises ConfigError or another MoEServeError with one sentence.
    """
    config = source if isinstance(source, ServiceConfig) else load_config(source)
    if cluster is not None:
        config = load_config({**config.model_dump(exclude_unset=True), "cluster": {"kind": cluster}})
    service = BackgroundService(config, progress)
    service.start()
    return service
