"""The engine behind the gRPC service: a batcher and a forward pass per layer, a link per host."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch

from moeserve.api.output import ForwardOutput
from moeserve.api.request import LayerRequest
from moeserve.checkpoints import LayerSource
from moeserve.errors import DeadlineExceeded, Overloaded
from moeserve.frontend import timing
from moeserve.frontend.admission import Admission
from moeserve.frontend.batcher import Batcher
from moeserve.frontend.canary import Canary
from moeserve.frontend.compute import Compute
from moeserve.frontend.forward import Forward
from moeserve.frontend.link import Dial, HostLink
from moeserve.frontend.settings import FrontendSettings, HostAccess
from moeserve.frontend.view import LayerView, Views
from moeserve.layer.head import LayerHead
from moeserve.loops import in_thread
from moeserve.observe.balancing import OUTCOMES, Balancing
from moeserve.observe.metrics import Metrics
from moeserve.observe.stats import HostInfo, HostStats, LayerStats, ServiceStats, facts, host_name
from moeserve.release import Release
from moeserve.transport import Channel


class Frontend:
    """Answers requests for any served layer with the hosts' help.

    `sources` are the layers of `release`.
    """

    def __init__(
        self, release: Release, sources: Sequence[LayerSource], settings: FrontendSettings, hosts: HostAccess, metrics: Metrics
    ) -> None:
        self.model = settings.model
        self.layers = [source.spec for source in sources]
        self._metrics = metrics
        self._use(release)
        self._timeout_s, self._hang_after_s = settings.resilience.request_timeout_s, settings.resilience.hang_after_ms / 1000
        self._hosts, self._on_health, self._here, self._spills = hosts, hosts.on_health, "", settings.spills
        self._failing: Mapping[int, str] = {}
        #: by layer, what was told last
        self._healthy: dict[int, bool] = {}
        #: by number; replaced, never changed, because threads read it
        self._links: Mapping[int, HostLink] = {number: self._link(number) for number in release.placement.hosts}
        #: epoch of a release, and the gates that were read for it
        self._read: tuple[int, list[LayerHead]] = release.epoch, list(map(LayerHead, sources))
        self._admission = Admission(settings.max_queued_tokens, metrics.queue_tokens.set)
        self._compute = Compute()
        self._forwards = [Forward(layer, Views(view), settings, metrics, self._compute) for layer, view in enumerate(self._views(release))]
        self._looker: asyncio.Task[None] | None = None
        self._batchers = [Batcher(forward.run, settings.batching, self._admission) for forward in self._forwards]

    def _link(self, number: int) -> HostLink:
        dial = Dial(partial(self._hosts.find, number), partial(self._try_host, number), self._hosts.keys, self._hang_after_s)
        link = HostLink(host_name(number), dial, self._metrics, self._hosts_changed)
        link.set_failing(self._failing.get(number, ""))
        return link

    @property
    def epoch(self) -> int:
        """The epoch that new batches use."""
        return self._release.epoch

    @property
    def oldest_epoch(self) -> int:
        """The earliest epoch that a batch may still use."""
        return min(forward.views.oldest_epoch for forward in self._forwards)

    async def connect(self, release: Release) -> None:
        """Connect to the hosts of `release` that are new."""
        new = {number: self._link(number) for number in release.placement.hosts if number not in self._links}
        self._links = {**self._links, **new}
        await asyncio.gather(*(link.start(self._here) for link in new.values()))

    async def try_out(self, release: Release, sources: Sequence[LayerSource]) -> None:
        """`prepare`, and let experts of `release` answer canary rows. Raises any failure."""
        await self.prepare(release, sources)
        deadline = time.monotonic() + self._timeout_s
        for forward, view in zip(self._forwards, self._views(release), strict=True):
            await Canary(forward.exchange, self._spills).try_release(view, forward.views.current, deadline)

    async def _try_host(self, number: int, channel: Channel, erred_in: Collection[int]) -> None:
        """Rows for experts of the layers that the host has erred in, or of the first one, as far as it has any. Raises any failure."""
        current = [(forward, forward.views.current) for forward in self._forwards]
        held = [number in view.links and view.placement.shared_local_expert[number] > 0 for _, view in current]
        for layer in [layer for layer in erred_in if held[layer]] or [layer for layer, is_held in enumerate(held) if is_held][:1]:
            forward, view = current[layer]
            await Canary(forward.exchange, self._spills).try_host(view, number, channel, self._timeout_s)

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(timing.STUCK_LOOK_S)
            for link in self._links.values():
                link.look()

    async def prepare(self, release: Release, sources: Sequence[LayerSource]) -> None:
        """Read the changed gates of `release` (`sources` are its layers) in a thread, and keep them.

        Raises CheckpointError when one cannot be read.
        """
        if self._read[0] == release.epoch:
            return
        names = [source.spec.name for source in sources]
        kept = [self._release.origins(name).get(None) == release.origins(name).get(None) for name in names]
        present = [forward.views.current.head for forward in self._forwards]

        def read() -> list[LayerHead]:
            return [head if is_kept else LayerHead(source) for head, is_kept, source in zip(present, kept, sources, strict=True)]

        self._read = release.epoch, await in_thread(read)

    async def forget(self) -> None:
        """Disconnect from hosts that have no experts of the current release."""
        kept = set(self._release.placement.hosts)
        gone = [link for number, link in self._links.items() if number not in kept]
        self._links = {number: link for number, link in self._links.items() if number in kept}
        for link in gone:
            await link.close()
            self._metrics.forget_host(link.name)

    def set_failing(self, failing: Mapping[int, str]) -> None:
        """Sets the hosts that are down and not restarting, and why."""
        for number in sorted(failing.keys() - self._failing.keys()):
            self._metrics.events.add("host_failing", host_name(number))
        self._metrics.hosts_failing.set(len(failing))
        self._failing = dict(failing)
        for number, link in self._links.items():
            link.set_failing(failing.get(number, ""))
        for forward in self._forwards:
            forward.hosts_changed()

    def set_balancing(self, said: Balancing) -> None:
        """What the controller has done to balance the hosts, for metrics and events."""
        before, self._metrics.balancing.said = self._metrics.balancing.said, said
        for outcome in OUTCOMES:
            if outcome != "unchanged" and said.rounds.get(outcome, 0) > before.rounds.get(outcome, 0):
                self._metrics.events.add(f"rebalance_{outcome}", said.latest)

    def set_busy(self, shares: Mapping[int, float]) -> None:
        """The share of its time that each host has lately spent in passes, by number."""
        self._metrics.busy.said = shares

    def set_wanted(self, hosts: int, missing: int) -> None:
        """How many hosts should run, and how many of them have no room on the nodes."""
        self._metrics.wanted_hosts.set(hosts)
        self._metrics.hosts_missing.set(missing)

    def refresh(self, hosts: Mapping[int, HostInfo]) -> None:
        """Update what is known about hosts, by number."""
        for number in self._links.keys() & hosts.keys():
            self._links[number].refresh(hosts[number])

    def publish(self, release: Release) -> None:
        """New batches use `release`, for which `prepare` has been called; running batches finish as they began."""
        for forward, view in zip(self._forwards, self._views(release), strict=True):
            forward.views.publish(view)
        self._use(release)
        self._hosts_changed()

    async def drained(self) -> None:
        """Returns when no batch uses an earlier release than the current one."""
        await asyncio.gather(*(forward.views.drained() for forward in self._forwards))

    async def start(self, node: str) -> None:
        """Connect to every host: through shared memory on `node`, where this process runs, over TCP elsewhere."""
        self._here = node
        self._looker = asyncio.create_task(self._look())
        await asyncio.gather(*(link.start(node) for link in self._links.values()))

    async def close(self) -> None:
        """Disconnect from the hosts; running requests fail."""
        if self._looker is not None:
            self._looker.cancel()
        await asyncio.gather(*(link.close() for link in self._links.values()))
        self._compute.close()

    async def forward(self, layer: int, request: LayerRequest) -> ForwardOutput:
        """One validated request. Raises Overloaded, ExpertUnavailable, DeadlineExceeded; cancelling the task gives it up."""
        # Not kept in a variable: an error would refer to this frame, and the frame to the error, with all tensors of the request.
        return await self.submit(layer, request)

    def submit(self, layer: int, request: LayerRequest) -> asyncio.Future[ForwardOutput]:
        """As `forward`, without a task; the future fails at the deadline, and cancelling it gives the request up. Raises Overloaded."""
        now = time.monotonic()
        deadline = now + self._timeout_s if request.deadline is None else request.deadline
        if deadline <= now:
            raise DeadlineExceeded("the deadline had passed when the request arrived")
        answer = self._batchers[layer].submit(request, deadline)
        timer = answer.get_loop().call_at(deadline, _expire, answer, self.layers[layer].name)
        answer.add_done_callback(lambda _: timer.cancel())
        return answer

    @contextmanager
    def together(self) -> Iterator[None]:
        """Requests that reach it meanwhile join one batch of their layer, as far as they fit: do not wait for them inside."""
        for batcher in self._batchers:
            batcher.hold()
        try:
            yield
        finally:
            for batcher in self._batchers:
                batcher.release()

    def refusal(self, caller: str, deadline: float | None) -> Overloaded | None:
        """Why any request of `caller` would be refused now, whatever it asks for; None = it is worth reading."""
        now = time.monotonic()
        return self._admission.refusal(caller, now + self._timeout_s if deadline is None else deadline, now)

    def revision(self, layer: int) -> int:
        """The `model_revision` of answers to requests that begin now."""
        return self._forwards[layer].views.current.revision

    def stats(self) -> ServiceStats:
        """Counts since the start and the state of the hosts."""
        metrics, release, links = self._metrics, self._release, self._links
        queues, busy = metrics.host_queues(), metrics.busy.said
        return ServiceStats(
            epoch=release.epoch,
            layers=[self._layer_stats(index, spec.name) for index, spec in enumerate(self.layers)],
            hosts=[_host_stats(number, link, queues.get(link.name, 0), busy.get(number)) for number, link in sorted(links.items())],
            queue_tokens=self._admission.tokens,
            uptime_s=metrics.uptime_s,
            expert_retries=metrics.retries(),
            requests=metrics.request_durations(),
            stages=metrics.stage_durations(),
            calls=metrics.calls(),
            events=metrics.events.latest(),
            changing=metrics.balancing.said.changing,
        )

    def _layer_stats(self, index: int, name: str) -> LayerStats:
        layer, counts = self._release.placement.layers[index], self._metrics.experts
        return LayerStats(
            name=name,
            tokens=counts.tokens[index],
            processed_by_expert=counts.processed[index].tolist(),
            dropped_by_expert=counts.dropped(index).tolist(),
            live_copies=counts.live_copies[index][: layer.num_experts].tolist(),
            tensor_parallel=layer.tensor_parallel,
            placement=self._held[index],
            host_balancedness=self._metrics.balancing.said.balancedness_of(index),
        )

    def _views(self, release: Release) -> list[LayerView]:
        """The views of a prepared release, by layer."""
        epoch, heads = self._read
        assert epoch == release.epoch, "a release is prepared before it is used"
        links = {number: self._links[number] for number in release.placement.hosts}
        return [
            LayerView(epoch, release.revision(head.spec.name), head, places, links)
            for head, places in zip(heads, release.placement.layers, strict=True)
        ]

    def _use(self, release: Release) -> None:
        self._release = release
        #: by layer, what each host has: read every second, changed with the release
        self._held = [release.held(layer) for layer in range(len(release.placement.layers))]
        self._metrics.placement_epoch.set(release.epoch)

    def _hosts_changed(self) -> None:
        up = np.zeros(self._release.placement.num_hosts, dtype=np.bool_)
        for number in self._release.placement.hosts:
            up[number] = self._links[number].channel_at(self._release.epoch) is not None
        for index, layer in enumerate(self._release.placement.layers):
            copies = layer.live_copies(up)
            self._metrics.experts.live_copies[index][: len(copies)] = torch.from_numpy(copies)
            if (healthy := bool(copies.all())) is not self._healthy.get(index):
                self._healthy[index] = healthy
                self._on_health(index, healthy)
        for forward in self._forwards:
            forward.hosts_changed()


def _expire(answer: asyncio.Future[ForwardOutput], layer: str) -> None:
    if not answer.done():
        answer.set_exception(DeadlineExceeded(f"layer {layer} did not answer before the deadline"))


def _host_stats(number: int, link: HostLink, queue_tokens: int, busy: float | None) -> HostStats:
    return HostStats(link.name, link.channel is not None, link.restarts, queue_tokens, number, link.condition, busy, **facts(link.info))
