"""Clients in other processes and other event loops than those they were made in."""

from __future__ import annotations

import asyncio
import copy
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from moeserve import errors
from moeserve.client import TLS, AdminClient, AsyncClient, Client
from moeserve.compat.deepspeed import MoE
from tests.support.certificates import Authority
from tests.support.engine import EXPERTS, HIDDEN, FakeEngine, X
from tests.support.servers import served

FORKING = """
import os, sys, moeserve

client = moeserve.Client(sys.argv[1], timeout=20)

def fork():
    if os.fork():
        os.wait()
        return
    try:
        print(len(client.layers()), len(moeserve.Client(sys.argv[1], timeout=20).layers()), flush=True)
    except moeserve.MoEServeError as error:
        print(error, flush=True)
    os._exit(0)

fork()
for _ in range(int(sys.argv[2])):
    client.layers()
    fork()
print("parent", len(client.layers()))
"""


def answers(client: Client) -> list[float]:
    return client.forward(X).hidden_states.flatten().tolist()


def answers_async(client: AsyncClient) -> list[float]:
    async def ask() -> list[float]:
        async with client:
            return (await client.forward(X)).hidden_states.flatten().tolist()

    return asyncio.run(ask())


def test_clients_go_to_processes_that_are_spawned(engine: FakeEngine, tmp_path: Path) -> None:
    """As those of a DataLoader, with everything they were made with, before they were used or after."""
    (tmp_path / "token").write_text("secret\n")
    ours = Authority(tmp_path, "ours")
    cert, key = ours.sign("server")
    made = {"token": "secret", "tls": TLS(ca=ours.certificate), "timeout": 20.0}
    with served(engine, tls_cert=cert, tls_key=key, auth_token_file=tmp_path / "token") as (target, _, _):
        used, unused = Client(target, **made), AsyncClient(target, **made)
        assert answers(used) == X.flatten().tolist()
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            assert pool.apply(answers, (used,)) == pool.apply(answers_async, (unused,)) == X.flatten().tolist()
        assert answers(used) == X.flatten().tolist()
        used.close()


def test_copies_have_connections_of_their_own(target: str) -> None:
    with Client(target) as client:
        answers(client)
        for made in (copy.deepcopy(client), pickle.loads(pickle.dumps(client))):
            assert answers(made) == X.flatten().tolist()
            made.close()
        assert answers(client) == X.flatten().tolist()
        layer = MoE(HIDDEN, torch.nn.Linear(HIDDEN, HIDDEN), EXPERTS, k=2, target=client).eval()
        for each in (layer, copy.deepcopy(layer)):
            each(X)
    with pytest.raises(errors.MoEServeError, match="does not offer this method"), copy.deepcopy(AdminClient(target, "token")) as admin:
        admin.status()


def test_forked_processes(target: str) -> None:
    """Before the client was used and after. Where gRPC cannot go on, that is said: it would wait for ever.

    Often, because what gRPC keeps of the parent's connection ends a moment after the fork.
    """
    command = [sys.executable, "-c", FORKING, target]
    running = [
        subprocess.Popen([*command, forks], env={**os.environ, "GRPC_ENABLE_FORK_SUPPORT": support}, stdout=subprocess.PIPE, text=True)
        for support, forks in (("1", "20"), ("0", "1"))
    ]
    try:
        supported, not_supported = (process.communicate(timeout=60)[0].splitlines() for process in running)
    finally:
        for process in running:
            process.kill()
    assert supported == ["2 2"] * 21 + ["parent 2"]
    assert not_supported[0::2] == ["2 2", "parent 2"]
    assert not_supported[1].startswith("this process was forked after its parent had used a client, with GRPC_ENABLE_FORK_SUPPORT=0")


SUBMITTING = """
import atexit, os, sys

atexit.register(lambda: print(unfinished.cancelled(), flush=True))  # after all that is registered later

import moeserve, torch

rows = torch.ones(1, 16)
client = moeserve.Client(sys.argv[1], timeout=20)
client.submit(rows[:0]).result(20)
if os.fork():
    os.wait()
    unfinished = client.submit(rows)
    sys.exit()
try:
    print(len(client.layers()), client.submit(rows[:0]).result(20))
except Exception as error:
    print(repr(error))
sys.stdout.flush()
os._exit(0)
"""


def test_submitted_calls_and_the_end_of_a_program_or_a_fork(target: str, engine: FakeEngine) -> None:
    """Threads in compiled code would abort a program that ends; asyncio's gRPC does not go on in a child: calls would wait for ever."""
    engine.gate.clear()
    found = subprocess.run([sys.executable, "-c", SUBMITTING, target], capture_output=True, text=True, timeout=60, check=False)
    told, cancelled = found.stdout.splitlines()
    assert told.startswith("MoEServeError('this process was forked while its parent had an AsyncClient, calls of submit")
    assert (found.returncode, cancelled) == (0, "True")


BUSY = """
import faulthandler, os, sys, threading, time
import torch
import moeserve, moeserve.client.client, moeserve.client.memory

class Clock:
    def monotonic(self):
        stay()
        return time.monotonic()

inside = threading.Semaphore(0)
main = threading.main_thread()

def stay(*_, **__):
    if threading.current_thread() is not main:
        inside.release()
        threading.Event().wait()

def made(*_, **__):
    stay()
    return moeserve.AsyncClient(sys.argv[1])

moeserve.client.client.AsyncClient, moeserve.client.memory.time = made, Clock()
torch.set_num_threads(1)  # those of torch do not survive a fork
rows = torch.ones(5000, int(sys.argv[2]))
client = moeserve.Client(sys.argv[1], timeout=20)
for call in (client.submit, client.forward):
    threading.Thread(target=call, args=(rows,), daemon=True).start()
    inside.acquire()
if (child := os.fork()) == 0:
    faulthandler.dump_traceback_later(20, exit=True)
    print(tuple(client.forward(rows).hidden_states.shape), flush=True)
    client.close()
    print("closed", flush=True)
    os._exit(0)
os.waitpid(child, 0)
os._exit(0)
"""


def test_a_fork_while_other_threads_begin_calls(target: str) -> None:
    """What they hold at that moment, nobody gives back in the child."""
    command = [sys.executable, "-c", BUSY, target, str(HIDDEN)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout.splitlines() == [str((5000, HIDDEN)), "closed"], found.stderr


SERVING = """
import asyncio, os, signal, sys
import grpc.aio
from moeserve import AsyncClient

async def serve():
    server = grpc.aio.server()
    await server.start()
    return server

async def ask():
    async with AsyncClient(sys.argv[1], timeout=20) as client:
        return await client.layers()

runner = asyncio.Runner()
server = runner.run(serve())
if (child := os.fork()) == 0:
    signal.alarm(30)
    try:
        print(asyncio.run(ask()))
    except Exception as error:
        print(repr(error))
    sys.stdout.flush()
    os._exit(0)
os.waitpid(child, 0)
os._exit(0)
"""


def test_a_process_forked_from_one_that_serves(target: str) -> None:
    found = subprocess.run([sys.executable, "-c", SERVING, target], capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout.startswith("MoEServeError('this process was forked while its parent had")


def test_event_loops_one_after_another(target: str) -> None:
    """Closed in between, or not, and beside a loop that goes on in another thread."""
    client = AsyncClient(target)

    async def ask(closes: bool = False) -> list[float]:
        streamed = (await client.forward(X)).hidden_states.flatten().tolist()
        if closes:
            await client.close()
        return streamed

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        for closes in (False, True, True, False):
            assert asyncio.run(ask(closes)) == X.flatten().tolist()
            assert asyncio.run_coroutine_threadsafe(ask(), loop).result(20) == X.flatten().tolist()
        asyncio.run_coroutine_threadsafe(client.close(), loop).result(20)
        with pytest.raises(errors.MoEServeError, match=f"this client of {target} is closed"):
            asyncio.run_coroutine_threadsafe(ask(), loop).result(20)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


class AskedLoop(asyncio.SelectorEventLoop):
    """Does something when it is asked whether it is closed."""

    when_asked: Callable[[], None] = staticmethod(lambda: None)

    def is_closed(self) -> bool:
        self.when_asked()
        return super().is_closed()


def test_event_loops_that_begin_at_the_same_time(target: str) -> None:
    """In threads of their own: each has the connection that it has closed, or uses."""
    client = AsyncClient(target)

    def close() -> None:
        with asyncio.Runner() as runner:
            runner.run(client.close())
            is_closed.set()
            assert has_answered.wait(30)
            with pytest.raises(errors.MoEServeError, match="closed"):
                runner.run(client.forward(X))

    is_closed, has_answered, loop = threading.Event(), threading.Event(), AskedLoop()
    loop.run_until_complete(client.layers())
    with ThreadPoolExecutor(1) as pool:
        closing: list[Future[None]] = []

        def begin() -> None:
            loop.when_asked = lambda: None
            closing.append(pool.submit(close))
            is_closed.wait(0.3)

        loop.when_asked = begin
        assert answers_async(client) == X.flatten().tolist()
        has_answered.set()
        closing[0].result(30)
    loop.run_until_complete(client.close())
    loop.close()


def test_a_closed_client_says_so(target: str) -> None:
    client = Client(target)
    answers(client)
    client.close()
    client.close()
    with pytest.raises(errors.MoEServeError, match=f"this client of {target} is closed"):
        answers(client)
