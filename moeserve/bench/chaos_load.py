"""Clients in a process of their own, each asking one question after the other."""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from queue import Empty, SimpleQueue
from typing import Any, Final, NamedTuple

import torch

from moeserve.bench.chaos_questions import Question, make_questions
from moeserve.bench.load import WrongAnswer
from moeserve.client import Client
from moeserve.config import ServiceConfig
from moeserve.errors import MoEServeError
from moeserve.programs.interpreter import interpreter

#: how often the results so far are passed on
_TELL_S: Final = 0.2
#: without it, clients would spin on a service that refuses at once
_PAUSE_AFTER_FAILURE_S: Final = 0.05
RIGHT: Final = "right"
WRONG: Final = "wrong"


class ClientCall(NamedTuple):
    """One request: monotonic seconds, and `outcome` right, wrong or the status code of its error."""

    begin: float
    end: float
    tokens: int
    outcome: str


class LoadProcess:
    """`ready`, `begin`, then `stop`; `kill` it in any case. `calls` are those that have ended so far."""

    def __init__(self, config: ServiceConfig, clients: int, seed: int) -> None:
        self.calls: list[ClientCall] = []
        self.outcomes: Counter[str] = Counter()
        #: how late its process was to run, at worst: then the machine was busy with something else
        self.longest_lag_s = 0.0
        self._pipe, theirs = multiprocessing.Pipe()
        # Not a Process of multiprocessing, which unblocks signals here.
        program = "import sys; from moeserve.bench.chaos_load import run_clients; run_clients(int(sys.argv[1]))"
        command = [*interpreter(), "-c", program, str(theirs.fileno())]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])  # noqa: S603 - this very program
        theirs.close()
        self._pipe.send((config, clients, seed))
        self._reading: asyncio.Task[None] | None = None

    async def ready(self) -> None:
        """Waits until it knows the answers. Raises what keeps it from that."""
        error = await asyncio.to_thread(self._receive)
        if isinstance(error, MoEServeError):
            raise error

    def begin(self, target: str) -> None:
        """The clients call the service at `target` from now on."""
        self._pipe.send(target)
        self._reading = asyncio.create_task(asyncio.to_thread(self._read))
        self._reading.add_done_callback(lambda task: task.cancelled() or task.exception())  # `stop` may never come to ask

    async def stop(self) -> None:
        """Waits until all calls have ended."""
        assert self._reading is not None, "it has begun"
        with suppress(OSError):  # its end is told below
            self._pipe.send(None)
        await self._reading

    def kill(self) -> None:
        """In any state; idempotent."""
        self._process.kill()
        self._process.wait()

    def _read(self) -> None:
        while (received := self._receive()) is not None:
            calls, lag_s = received
            self.calls.extend(calls)
            self.outcomes.update(call.outcome for call in calls)
            self.longest_lag_s = max(self.longest_lag_s, lag_s)

    def _receive(self) -> Any:
        try:
            return self._pipe.recv()
        except (EOFError, OSError):
            raise MoEServeError(f"the process of the clients has ended with exit code {self._process.wait()}") from None


def run_clients(fd: int) -> None:
    """All of the process of the clients; `fd` is its end of the pipe."""
    pipe = Connection(fd)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C: the other process ends this one
    torch.set_num_threads(1)  # idle threads would spin on the cores of the hosts
    with suppress(OSError, EOFError):  # the other process is gone
        config, clients, seed = pipe.recv()
        try:
            questions = make_questions(config, seed)
        except MoEServeError as error:
            pipe.send(error)
            return
        pipe.send(None)
        _ask_until_told(pipe.recv(), questions, clients, pipe)


def _ask_until_told(target: str, questions: Sequence[Question], clients: int, pipe: Connection) -> None:
    ended: SimpleQueue[ClientCall] = SimpleQueue()
    stopping = threading.Event()
    threads = [threading.Thread(target=_client, args=(target, questions, number, ended, stopping)) for number in range(clients)]
    for thread in threads:
        thread.daemon = True
        thread.start()
    due = time.monotonic() + _TELL_S
    while not pipe.poll(due - time.monotonic()):
        pipe.send((_taken(ended), time.monotonic() - due))
        due = time.monotonic() + _TELL_S
    stopping.set()
    for thread in threads:
        thread.join()
    pipe.send((_taken(ended), 0.0))
    pipe.send(None)


def _client(target: str, questions: Sequence[Question], number: int, ended: SimpleQueue[ClientCall], stopping: threading.Event) -> None:
    with Client(target, retry=False) as client:  # what is tried again is a failure that its caller has noticed
        for index in itertools.count(number):
            if stopping.is_set():
                return
            question = questions[index % len(questions)]
            begin = time.monotonic()
            outcome, end = _outcome(client, question)
            ended.put(ClientCall(begin, end, len(question.hidden_states), outcome))
            if outcome != RIGHT:
                stopping.wait(_PAUSE_AFTER_FAILURE_S)


def _outcome(client: Client, question: Question) -> tuple[str, float]:
    """And when the answer was there."""
    try:
        answer = client.forward(question.hidden_states, question.layer, token_ids=question.token_ids)
    except MoEServeError as error:
        return error.code.name, time.monotonic()
    except Exception as error:  # of the client itself: a failed call, too
        return type(error).__name__, time.monotonic()
    end = time.monotonic()
    try:
        question.check(answer)
    except WrongAnswer:
        return WRONG, end
    return RIGHT, end


def _taken(ended: SimpleQueue[ClientCall]) -> list[ClientCall]:
    calls = []
    with suppress(Empty):
        while True:
            calls.append(ended.get_nowait())
    return calls
