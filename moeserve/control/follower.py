"""A frontend that follows a controller: it carries out orders."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Coroutine
from typing import Any, Protocol

from moeserve.checkpoints import LayerSource, ServedLayers
from moeserve.config import FrontendConfig, ServerConfig, load_json
from moeserve.control import timing
from moeserve.control.directory import Directory
from moeserve.control.follow import Order, Report, Setup
from moeserve.control.record import packed_counts
from moeserve.errors import ConfigError, MoEServeError, number_of
from moeserve.frontend import Frontend, FrontendSettings, HostAccess
from moeserve.loops import Notifier, in_thread
from moeserve.observe.metrics import Metrics
from moeserve.release import Release
from moeserve.transport import KeyPair

log = logging.getLogger(__name__)


class CannotFollow(ConfigError):
    """The order needs a restart of this frontend."""


class Stage(Protocol):
    """Receives the frontend, when there is one."""

    def enter(self, frontend: Frontend, metrics: Metrics, otlp_endpoint: str | None) -> None:
        """The frontend accepts requests."""
        ...

    def health_changed(self, layer: int, healthy: bool) -> None:
        """As `Frontend` tells it."""
        ...


class Follower:
    """Builds a `Frontend` from the first order and applies every later one, always the latest; `report` says how far it is.

    Without orders everything stays as it is. `server` is its own table; the controller sends the rest of the configuration.
    `layers`: the layers of that configuration, if they have been read already.
    """

    def __init__(self, server: ServerConfig, report: Report, stage: Stage, layers: ServedLayers | None = None) -> None:
        self.report = report
        #: notified of every new `report`
        self.reported = Notifier()
        self._server, self._stage = server, stage
        self._directory = Directory()
        self._order = Order()
        self._ordered = Notifier()
        self._told: Setup | None = None
        self._config: FrontendConfig | None = None
        #: of the configuration, as they were when this frontend started
        self._layers = layers
        self._keys: KeyPair | None = None
        self._frontend: Frontend | None = None
        #: number of the stream: a trial for one controller says nothing to the next
        self._stream = 0
        #: stream and epoch of the latest trial
        self._trial: tuple[int, int] | None = None
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def begin(self) -> None:
        """A stream of orders begins, perhaps from another controller."""
        self._stream += 1
        self.say(tried_epoch=0, refusal="")

    def hear(self, order: Order) -> None:
        """Takes an order. Raises CannotFollow."""
        if order.setup is not None:
            self._set_up(order.setup)
        if self._told is None:
            raise CannotFollow("the first order of the controller has no configuration")
        if order.current is not None and order.current.epoch < self.report.epoch:
            raise CannotFollow(
                f"the controller is at epoch {order.current.epoch}, this frontend at {self.report.epoch}; restart the frontend"
            )
        self._order = order
        self._directory.replace(order.hosts)
        if self._frontend is not None:
            self._frontend.set_failing(order.failing)
            self._frontend.set_balancing(order.balancing)
            self._frontend.set_busy(order.busy)
            self._frontend.set_wanted(order.wanted_hosts, order.missing_hosts)
        self._ordered.notify()

    def say(self, **changes: object) -> None:
        """Changes the report."""
        report = Report(**{**vars(self.report), **changes})
        if report != self.report:
            self.report = report
            self.reported.notify()

    async def run(self) -> None:
        """Carries out orders until cancelled. Raises ConfigError or CheckpointError when this frontend cannot."""
        done: Order | None = None
        while True:
            while (order := self._order) is done or order.current is None:
                await self._ordered.wait()
            await self._carry_out(order.current, order.candidate)
            if self._frontend is not None:
                self._frontend.refresh(self._directory.hosts)
            done = order

    async def close(self) -> None:
        """Disconnect from the hosts; running requests fail."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        if self._frontend is not None:
            await self._frontend.close()

    def _set_up(self, setup: Setup) -> None:
        if self._told is not None and self._told.service_id != setup.service_id:
            # Its epochs start again, so they name other placements and weights.
            raise CannotFollow("the controller serves another deployment now; restart the frontend")
        if self._told is not None and self._told.config_json != setup.config_json:
            raise CannotFollow("the controller has another configuration now; restart the frontend")
        self._keys = self._keys or setup.keys
        if self._keys is None:
            raise CannotFollow("the controller sent no keys for this frontend")
        self._told = setup
        self.say(public_key=self._keys.public)

    async def _carry_out(self, current: Release, candidate: Release | None) -> None:
        if self._frontend is None:
            await self._build(current)
        assert self._frontend is not None
        wanted = None if candidate is None else (self._stream, candidate.epoch)
        if self._trial not in (None, wanted):
            self._trial = None
            await self._end("trial")
        if current.epoch > self._frontend.epoch:
            await self._move_to(current, self._frontend)
        elif candidate is None:
            await self._frontend.forget()
        if candidate is not None and self._trial is None and candidate.epoch > current.epoch:
            self._trial = wanted
            self._do("trial", self._try_out(candidate, self._frontend))

    async def _build(self, release: Release) -> None:
        assert self._told is not None and self._keys is not None
        self._config = load_json(self._told.config_json)
        sources = await in_thread(self._sources, release)
        metrics = Metrics([source.spec for source in sources], self._config.observability.expert_detail)
        settings = FrontendSettings.of(self._config, self._server)
        hosts = HostAccess(self._directory.find, self._keys, self._stage.health_changed)
        # It reads every gate; probes are answered meanwhile.
        self._frontend = await in_thread(Frontend, release, sources, settings, hosts, metrics)
        self._frontend.set_failing(self._order.failing)
        metrics.balancing.said, metrics.busy.said = self._order.balancing, self._order.busy
        self._frontend.set_wanted(self._order.wanted_hosts, self._order.missing_hosts)
        self._stage.enter(self._frontend, metrics, self._config.observability.otlp_endpoint)
        self._do("start", self._frontend.start(self.report.node))
        self._do("demand", self._tell_of_demand(metrics))
        self.say(epoch=release.epoch, oldest_epoch=release.epoch)

    def _sources(self, release: Release) -> list[LayerSource]:
        assert self._config is not None
        self._layers = self._layers or ServedLayers.read(self._config)
        sources: list[LayerSource] = [*release.sources(self._layers)]
        if len(sources) != len(release.placement.layers):
            raise ConfigError(
                f"the controller serves {number_of(len(release.placement.layers), 'layer')}, but the checkpoint here has {len(sources)}"
            )
        return sources

    async def _move_to(self, release: Release, frontend: Frontend) -> None:
        """New batches use the release; after running batches, or their time limit, it disconnects from hosts that are not needed."""
        sources = await in_thread(self._sources, release)
        await _within(timing.REACH_S, frontend.connect(release))
        await frontend.prepare(release, sources)
        frontend.publish(release)
        self.say(epoch=release.epoch, oldest_epoch=frontend.oldest_epoch)
        log.info("serving epoch %d", release.epoch)
        assert self._told is not None
        if not await _within(self._told.drain_timeout_s, frontend.drained()):
            log.warning("epoch %d: batches still wait for hosts that leave; they start again on other hosts", release.epoch)
        await frontend.forget()
        self._do("drain", self._tell_when_drained(frontend))

    async def _tell_when_drained(self, frontend: Frontend) -> None:
        await frontend.drained()
        self.say(oldest_epoch=frontend.oldest_epoch)

    async def _tell_of_demand(self, metrics: Metrics) -> None:
        while True:
            self.tell_of_demand(metrics)
            await asyncio.sleep(timing.DEMAND_S)

    def tell_of_demand(self, metrics: Metrics) -> None:
        """Says what callers have asked for, and all else that was counted, unless it can be read elsewhere."""
        counted = None if self.report.metrics_target else metrics.counted()
        requested = packed_counts(pairs.numpy() for pairs in metrics.experts.requested())
        self.say(requested=requested, call_times=metrics.call_times.counts(), counted=counted)

    async def _try_out(self, release: Release, frontend: Frontend) -> None:
        assert self._config is not None
        refusal, timeout_s, trial = "", self._config.resilience.request_timeout_s, self._trial
        try:
            sources = await in_thread(self._sources, release)
            if not await _within(timeout_s, frontend.connect(release)):
                raise ConfigError(f"not all hosts were reached within {timeout_s:g} s")
            await frontend.try_out(release, sources)
        except MoEServeError as error:
            refusal = str(error)
        except Exception as error:  # any error: the controller must not wait for it
            log.exception("cannot try epoch %d", release.epoch)
            refusal = f"{type(error).__name__}: {error}"
        if trial == (self._stream, release.epoch):
            self.say(tried_epoch=release.epoch, refusal=refusal)

    def _do(self, what: str, work: Coroutine[Any, Any, None]) -> None:
        """Runs `work` in the background, in place of an earlier one of the same name."""
        if what in self._tasks:
            self._tasks[what].cancel()
        self._tasks[what] = asyncio.create_task(work)

    async def _end(self, what: str) -> None:
        task = self._tasks.pop(what)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _within(timeout_s: float, work: Awaitable[None]) -> bool:
    """Whether `work` ended in time."""
    try:
        async with asyncio.timeout(timeout_s):
            await work
    except TimeoutError:
        return False
    return True
