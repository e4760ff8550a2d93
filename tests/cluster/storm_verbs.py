"""What administrators and accidents do to a service in a storm, at random."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from moeserve import Client, ConfigError, ExpertUnavailable
from moeserve.client import AdminClient
from moeserve.observe.status import HostStatus
from tests.cluster.storm_load import COPIES, Weights
from tests.cluster.storm_weights import EXPERTS, LAYERS, VERSIONS, layer_name
from tests.support.waiting import until

MOST_HOSTS = 5
#: for one change, and those that it waits for
PATIENCE_S = 90.0


class Verb(NamedTuple):
    """`what` is for people."""

    what: str
    carry_out: Callable[[], object]


class Storm:
    """The same `seed` makes the same storm, but for what happens at once. A change that is refused with a sentence is left."""

    def __init__(self, target: str, token: str, paths: Sequence[Path], weights: Weights, seed: int) -> None:
        self.admin, self._client = AdminClient(target, token), Client(target)
        self.done, self.refused = Counter[str](), Counter[str]()
        self._paths, self._weights, self._chance = paths, weights, random.Random(seed)
        self._kinds: list[Callable[[], Verb]] = []
        self._killed = set[int]()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """After an error, what has happened is printed."""
        print(f"done {dict(self.done)}, refused {dict(self.refused)}")
        if error is not None:
            for event in self.admin.events(timeout=10.0):
                print(event)
        self.admin.close()
        self._client.close()

    def blow(self) -> None:
        """One or two changes, and perhaps a host dies meanwhile. Raises what is no refusal; a change that does not end is none."""
        verbs = [self._next() for _ in range(self._chance.randint(1, 2))]
        with ThreadPoolExecutor(len(verbs)) as pool:
            running = [pool.submit(self._try, verb) for verb in verbs]
            if self._chance.random() < 0.5:
                until(lambda: self.admin.status().is_changing or all(each.done() for each in running))
                self._kill()
        for each in running:
            each.result()

    def whole(self) -> Sequence[HostStatus]:
        """The hosts, if the controller and the frontend find all of them up, and know of those that were killed."""
        hosts = self.admin.status().hosts
        up = {host.number for host in self._client.stats().hosts if host.state in {"up", "slow"}}
        is_whole = all(host.is_up and host.pid not in self._killed for host in hosts) and up == {host.number for host in hosts}
        return hosts if is_whole else []

    def _next(self) -> Verb:
        """Every kind has its turn, in any order."""
        if not self._kinds:
            self._kinds = [self._scale, self._scale, self._drain, self._swap_layers, self._swap_experts, self._copies, self._rebalance]
            self._chance.shuffle(self._kinds)
        return self._kinds.pop()()

    def _try(self, verb: Verb) -> None:
        kind, begin = verb.what.split()[0], time.monotonic()
        try:
            said = verb.carry_out()
            self.done[kind] += 1
        except (ConfigError, ExpertUnavailable) as error:
            said = f"refused: {error}"
            self.refused[kind] += 1
        print(f"{begin:.1f}: {verb.what}: {said}, after {time.monotonic() - begin:.1f} s")

    def _kill(self) -> None:
        """A host, when all are up: every expert has another copy."""
        victim = self._chance.choice(until(self.whole))
        print(f"{time.monotonic():.1f}: kill {victim.name}")
        with suppress(ProcessLookupError):  # a change may just have ended it
            os.kill(victim.pid, signal.SIGKILL)
            self._killed.add(victim.pid)
            self.done["kill"] += 1

    def _scale(self) -> Verb:
        number = self._chance.randint(COPIES, MOST_HOSTS)
        return Verb(f"scale to {number}", lambda: self.admin.scale(number, PATIENCE_S))

    def _drain(self) -> Verb:
        chosen = self._chance.randrange(MOST_HOSTS)

        def drain() -> object:
            hosts = self.admin.status().hosts
            return self.admin.drain(hosts[chosen % len(hosts)].name, PATIENCE_S)

        return Verb(f"drain the host at {chosen}", drain)

    def _swap_layers(self) -> Verb:
        layer = self._chance.randrange(LAYERS + 1)
        return self._swap(range(LAYERS) if layer == LAYERS else [layer], range(EXPERTS))

    def _swap_experts(self) -> Verb:
        return self._swap([self._chance.randrange(LAYERS)], self._chance.sample(range(EXPERTS), 2))

    def _swap(self, layers: Sequence[int], experts: Sequence[int]) -> Verb:
        version = self._chance.randrange(VERSIONS)
        name = layer_name(layers[0]) if len(layers) == 1 else ""
        named = () if len(experts) == EXPERTS else experts

        def swap() -> object:
            with self._weights.swap(layers, experts, version):
                return self.admin.swap(name, self._paths[version], named, PATIENCE_S)

        return Verb(f"swap {name or 'every layer'}, experts {named or 'all'}: version {version}", swap)

    def _copies(self) -> Verb:
        layer, expert = layer_name(self._chance.randrange(LAYERS)), self._chance.randrange(EXPERTS)
        copies = self._chance.randint(COPIES, COPIES + 1)
        what = f"copies of expert {expert} of {layer}: {copies}"
        return Verb(what, lambda: self.admin.scale_copies(copies, layer, expert, PATIENCE_S))

    def _rebalance(self) -> Verb:
        return Verb("rebalance", lambda: self.admin.rebalance(timeout=PATIENCE_S))
